"""Training beside quantised layers: the loss falls, and the file gives the trained picture in stock diffusers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from adapters.compression import backends
from adapters.compression.storage import plain_weight, storage
from adapters.errors import InputError, MissingDependencyError
from studio.datasets.cache import fingerprint
from studio.training import ready
from studio.training.tasks.image import run
from tests import tiny
from tests.training.conftest import Watcher, settings

EACH = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}"))
    for name, package in backends.PACKAGES.items()
]
CASES = [
    pytest.param(family, *case.values, marks=case.marks) for family, each in (("flux", EACH), ("sd", EACH[1:2]))
    for case in each
]  # fmt: skip


@pytest.mark.parametrize(("family", "name"), CASES)
def test_thirty_steps(name: str, family: str, bases: Any, pictures: Path, tmp_path: Path) -> None:
    config = settings(
        bases(family), pictures, steps=30, quantization=name, batch_size=4, rank=4, timestep_min=0.7,
        sample_prompts=["a cross"],
    )  # fmt: skip
    result = run(config, tmp_path, Watcher())
    assert result["loss"] < result["first_loss"]

    pipe = diffusers.DiffusionPipeline.from_pretrained(bases(family))
    pipe.set_progress_bar_config(disable=True)
    backends.quantize(getattr(pipe, tiny.denoiser_name(pipe)), name, torch.float32)

    def draw() -> np.ndarray[Any, Any]:
        generator = torch.Generator().manual_seed(0)
        made = pipe("a cross", num_inference_steps=2, guidance_scale=2.0, width=32, height=32, generator=generator)
        return np.asarray(made.images[0]).astype(int)

    plain = draw()
    pipe.load_lora_weights(result["adapter"])
    drawn = np.asarray(diffusers.utils.load_image(result["samples"][0])).astype(int)
    assert np.abs(draw() - drawn).max() <= 1
    assert np.abs(plain - drawn).max() > 1


@pytest.mark.parametrize("name", EACH)
def test_fingerprint_of_a_quantised_model(name: str) -> None:
    def made(seed: int) -> str:
        model = tiny.flux(seed).transformer
        backends.quantize(model, name, torch.float32)
        return fingerprint(model)

    assert made(0) == made(0) != made(1)


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
def test_on_a_denoiser_from_a_gguf_file(pictures: Path, tmp_path: Path) -> None:
    from tests.pipelines.test_quantized import wide, write_gguf

    wide("flux").save_pretrained(tmp_path / "base")
    path = write_gguf(wide("flux").transformer, tmp_path / "denoiser.gguf", "Q8_0")
    config = settings(tmp_path / "base", pictures, steps=20, denoiser=str(path), batch_size=4, timestep_min=0.7)
    result = run(config, tmp_path / "run", Watcher())
    assert result["loss"] < result["first_loss"]


@pytest.mark.parametrize("name", EACH)
def test_the_base_is_not_touched(name: str, bases: Any, pictures: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from studio.training.tasks import image

    opened: list[Any] = []
    load = image.load_base
    monkeypatch.setattr(image, "load_base", lambda *arguments: opened.append(load(*arguments)) or opened[-1])
    run(settings(bases("flux"), pictures, steps=2, quantization=name, init="pissa"), tmp_path, Watcher())
    fresh = tiny.flux().transformer
    backends.quantize(fresh, name, torch.float32)
    found = opened[0].transformer
    for path, module in fresh.named_modules():
        if storage(module):
            layer: Any = found.get_submodule(path)
            assert torch.equal(plain_weight(getattr(layer, "base_layer", layer)), plain_weight(module))


def test_missing_package_is_said_before_the_run(bases: Any, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="A base in 4bit needs the package 'bitsandbytes'"):
        ready.image(settings(bases("sd"), pictures, quantization="4bit"))
    with pytest.raises(InputError, match="quantization"):
        settings(bases("sd"), pictures, quantization="3bit")
