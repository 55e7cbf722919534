"""The example scripts, run as programs on the embedded models, and the example configurations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import assets
from studio.composition.schema import ComposeConfig
from studio.federation.schema import FederateConfig
from studio.schema import JobConfig
from studio.training.schemas.distill import DistillConfig
from studio.training.schemas.image import TrainImageConfig
from studio.training.schemas.language import TrainLanguageConfig
from tests.language import tiny

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = Path(assets.__file__).parent / "models"
needs_model = pytest.mark.skipif(not (MODELS / "tinymoji").is_dir(), reason="the base model has not been exported here")


def run(script: str, *arguments: str | Path, home: Path) -> str:
    """What the example prints."""
    environment = {**os.environ, "ADAPTER_STUDIO_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [str(EXAMPLES / script)] if script.endswith(".sh") else [sys.executable, str(EXAMPLES / script)]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_model
def test_compose_with_regions(tmp_path: Path) -> None:
    said = run("compose_with_regions.py", "--steps", "2", "--out", tmp_path / "out", home=tmp_path)
    assert "1 picture of 128 x 64 pixels" in said
    assert (tmp_path / "out" / "picture-0.png").is_file()


@pytest.mark.journey
@needs_model
def test_redraw_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    out = tmp_path / "out"
    said = run("redraw_a_picture.py", "--steps", "4", "--out", out, home=tmp_path)
    assert "2 pictures of 64 x 64" in said
    start, whole, half = (
        Image.open(next((out / part).glob("picture-*.png"))).tobytes() for part in ("start", "whole", "half")
    )
    assert half[3 * 64 * 34 :] == start[3 * 64 * 34 :]  # what is black in the mask stays
    assert half[: 3 * 64 * 32] != start[: 3 * 64 * 32]
    assert whole != start


@pytest.mark.journey
@needs_model
def test_sweep_seeds_and_weights(tmp_path: Path) -> None:
    from PIL import Image

    grid = tmp_path / "grid.png"
    run("sweep_seeds_and_weights.py", "--steps", "2", "--seeds", "4", "5", "--weights", "0", "1", "--out", grid,
        home=tmp_path)  # fmt: skip
    with Image.open(grid) as picture:
        assert picture.size == (128, 128)
        cells = [picture.crop((x, y, x + 64, y + 64)).tobytes() for x in (0, 64) for y in (0, 64)]
    assert len(set(cells)) == 4


@pytest.mark.journey
@needs_model
def test_train_and_use(tmp_path: Path) -> None:
    said = run("train_and_use.py", "--steps", "2", "--out", tmp_path / "out", home=tmp_path)
    assert "trained 2 steps" in said
    pictures = [tmp_path / "out" / place / "picture-0.png" for place in ("with-adapter", "base-alone")]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


@pytest.mark.journey
@needs_model
def test_distil(tmp_path: Path) -> None:
    said = run("distil.py", "--steps", "1", "--trajectories", "1", "--knots", "5", "--out", tmp_path / "out",
        home=tmp_path)  # fmt: skip
    assert "steps: 1, loss" in said
    assert (tmp_path / "out" / "pictures" / "picture-0.png").is_file()


@pytest.mark.journey
@needs_model
def test_merge(tmp_path: Path) -> None:
    from adapters.formats import read

    said = run("merge.py", "fox:0.5", "robot", "--out", tmp_path / "merged.safetensors", home=tmp_path)
    assert "2 adapters" in said
    ranks = sum(read(assets.path(f"adapters/{name}/{name}.safetensors")).parameters() for name in ("fox", "robot"))
    assert read(tmp_path / "merged.safetensors").parameters() == ranks


@pytest.mark.journey
@pytest.mark.skipif(not (MODELS / "dust3r-tiny").is_dir(), reason="the pointmap network has not been trained here")
def test_reconstruct(tmp_path: Path) -> None:
    said = run("reconstruct.py", "--steps", "5", "--out", tmp_path / "out", home=tmp_path)
    assert "4 cameras" in said
    assert (tmp_path / "out" / "scene.glb").is_file()


@pytest.mark.journey
def test_chat(tmp_path: Path) -> None:
    said = run("chat.py", "red1?", "--base", tiny.llama(tmp_path / "base"), "--max-tokens", "4", home=tmp_path)
    assert said.startswith("base:")


@needs_model
@pytest.mark.slow
def test_train_on_two_processes(tmp_path: Path) -> None:
    run("compose_with_regions.py", "--steps", "1", "--out", tmp_path / "data", home=tmp_path)
    values = yaml.safe_load((EXAMPLES / "configs" / "concept.yaml").read_text())
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump({**values, "data": str(tmp_path / "data"), "steps": 2, "batch_size": 1}))
    run("train_on_two_processes.sh", config, tmp_path / "run", home=tmp_path)
    assert list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("concept", TrainImageConfig), ("style", TrainImageConfig), ("sdxl", TrainImageConfig),
        ("distil-guidance", DistillConfig), ("language", TrainLanguageConfig), ("regions", ComposeConfig),
        ("federate", FederateConfig),
    ],
)  # fmt: skip
def test_configurations_are_valid(name: str, schema: type[JobConfig]) -> None:
    values = yaml.safe_load((EXAMPLES / "configs" / f"{name}.yaml").read_text())
    missing = {} if schema in (ComposeConfig, FederateConfig) else {"data": "rows.jsonl"}
    if schema is DistillConfig:
        missing = {"prompts": "prompts.txt"}
    config = schema.parse({**values, **missing}, source=name)
    assert {key: config.model_dump(mode="json")[key] for key in values if key not in ("adapters", "regions")} == {
        key: value for key, value in values.items() if key not in ("adapters", "regions")
    }


def test_every_example_is_tested_and_listed() -> None:
    here = Path(__file__).read_text()
    listed = (EXAMPLES / "README.md").read_text()
    for file in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.sh")):
        assert f'"{file.name}"' in here
        assert f"`{file.name}`" in listed
    for file in (EXAMPLES / "configs").glob("*.yaml"):
        assert f'"{file.stem}"' in here
