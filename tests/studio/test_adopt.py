"""A trained adapter comes into the library by itself."""

from __future__ import annotations

import pytest
from PIL import Image

from studio import library
from studio.library import adopt
from studio.training.schemas.image import TrainImageConfig
from tests.studio.files import diffusers_lora


@pytest.fixture
def config() -> TrainImageConfig:
    return TrainImageConfig(name="my fox", data="x", trigger="zxq")


def test_it_gets_a_free_name_and_its_last_sample_as_preview(tmp_path, config):
    adapter = diffusers_lora(tmp_path / "fox.safetensors")
    sample = tmp_path / "sample.png"
    Image.new("RGB", (1024, 512), "red").save(sample)
    result = {"adapter": str(adapter), "samples": [str(sample)]}
    assert adopt.trained(config, result) == {**result, "library": "my fox"}
    assert adopt.trained(config, result)["library"] == "my fox-2"
    with Image.open(library.find("my fox").preview) as preview:
        assert preview.size == (512, 256)


def test_training_is_not_lost_when_the_library_cannot_take_it(tmp_path, config):
    (tmp_path / "odd.safetensors").write_text("odd")
    result = adopt.trained(config, {"adapter": str(tmp_path / "odd.safetensors")})
    assert "cannot be imported" in result["library_problem"]
