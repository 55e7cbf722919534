"""Sweeps: what is written becomes one picture per combination, and their grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adapters.errors import InputError
from adapters.progress import Silent
from studio.composition import job, recipe_png, sweep
from studio.composition.schema import ComposeConfig
from studio.composition.sweep_schema import SweepConfig, parse_axis
from tests import tiny


def config(*axes: str, **values: Any) -> SweepConfig:
    adapters = [{"name": "fox", "path": "fox"}]
    given = {"prompt": "a fox", "adapters": adapters, "axes": [parse_axis(axis) for axis in axes], **values}
    return SweepConfig.parse(given)


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("fox=0:1.2:7", "fox", [0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]),
        ("fox=1:0:3", "fox", [1, 0.5, 0]),
        ("seed=1,2,3", "seed", [1, 2, 3]),
        ("cfg = 2, 4.5", "guidance_scale", [2, 4.5]),
        ("method=merge,switch", "method", ["merge", "switch"]),
        ("checkpoint=C:/a.safetensors,b", "checkpoint", ["C:/a.safetensors", "b"]),
    ],
)
def test_axes_are_read(text: str, name: str, values: list[Any]) -> None:
    assert parse_axis(text) == {"name": name, "values": values}


@pytest.mark.parametrize("text", ["fox", "fox=", "=1", "seed=1.5", "fox=a,b", "fox=nan", "fox=0:1:0", "fox=0:1:9999"])
def test_what_is_no_axis_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_axis(text)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (["wolf=0,1"], "'wolf' cannot be swept"),
        (["seed=1", "seed=2"], "swept twice"),
        (["seed=0:254:255", "steps=1,2"], "510 pictures"),
    ],
)
def test_what_cannot_be_swept_is_refused(axes: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        config(*axes)


def test_every_combination_has_its_values() -> None:
    made = list(config("fox=0,1", "seed=1,2", images=4).combinations())
    assert [labels for labels, _ in made] == [(f"fox {w}", f"seed {s}") for w in (0, 1) for s in (1, 2)]
    assert [(one.adapters[0].weight, one.seed, one.images) for _, one in made] == [
        (0, 1, 1),
        (0, 2, 1),
        (1, 1, 1),
        (1, 2, 1),
    ]
    (_, other), *_ = config("checkpoint=step-100").combinations()
    assert (other.adapters[0].path, other.adapters[0].name) == ("step-100", "fox")


@pytest.fixture
def model(tmp_path: Path) -> dict[str, Any]:
    """A tiny base and an adapter for it."""
    path = tmp_path / "fox.safetensors"
    tiny.lora_file(tiny.sd(), tmp_path, seed=1).rename(path)
    adapters = [{"name": "fox", "path": str(path)}]
    return {"base": str(tiny.saved("sd", tmp_path)), "steps": 3, "device": "cpu", "adapters": adapters}


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize(("method", "passes"), [("merge", [3]), ("composite", [2, 2])])
def test_a_batch_makes_the_pictures_that_are_made_alone(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, passes: list[int]
) -> None:
    sizes = []
    together = job.run_together

    def counted(configs: Any, *rest: Any) -> Any:
        sizes.append(len(configs))
        return together(configs, *rest)

    monkeypatch.setattr(job, "run_together", counted)
    whole = config("fox=0,1.3", "seed=1,2", batch=3, method=method, **model)
    found = sweep.run(whole, tmp_path / "batch", Silent())
    assert sizes == passes
    alone = sweep.run(whole.model_copy(update={"batch": 1}), tmp_path / "alone", Silent())
    assert found["labels"] == alone["labels"]
    for here, there in zip(found["images"], alone["images"], strict=True):
        with Image.open(here) as one, Image.open(there) as other:
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
        recipe, other = recipe_png.read_recipe(Path(here)), recipe_png.read_recipe(Path(there))
        assert recipe["made_on"].pop("batch", 1) in (1, *passes)
        recipe["config"]["fold"] = other["config"]["fold"]
        assert recipe == other


@pytest.mark.usefixtures("nothing_kept")
def test_what_cannot_be_made_in_a_batch_is_made_alone(model: dict[str, Any], tmp_path: Path) -> None:
    values = {**model, "prompt": "a {red|blue|green|grey} cat"}
    found = sweep.run(config("seed=1,2", batch=2, **values), tmp_path, Silent())
    recipes = [recipe_png.read_recipe(Path(path)) for path in found["images"]]
    assert len({recipe["config"]["prompt"] for recipe in recipes}) == 2
    assert not any("batch" in recipe["made_on"] for recipe in recipes)


def test_the_grid_has_every_picture_at_its_place_and_names_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(one: ComposeConfig, folder: Path, monitor: Any) -> dict[str, Any]:
        if one.seed == 2 and one.adapters[0].weight == 1:
            raise InputError("not this one")
        colour = (int(200 * one.adapters[0].weight), 100 * one.seed, 0)
        path = recipe_png.save_png(Image.new("RGB", (64, 32), colour), folder / "picture-0.png", {"config": {}})
        return {"images": [str(path)], "remarks": ["the same of each"]}

    monkeypatch.setattr("studio.composition.job.run", draw)
    result = sweep.run(config("fox=0,1", "seed=1,2"), tmp_path, Silent())
    assert result["labels"] == {"000": "fox 0, seed 1", "001": "fox 0, seed 2", "002": "fox 1, seed 1"}
    assert result["skipped"] == {"fox 1, seed 2": "not this one"}
    assert result["remarks"] == ["the same of each"]
    with Image.open(result["grid"]) as sheet:
        width, height = 192, 96
        middle = [
            sheet.getpixel((sweep.LEFT + x * (width + sweep.GAP) + 96, sweep.TOP + y * (height + sweep.GAP) + 48))
            for y in (0, 1)
            for x in (0, 1)
        ]
    assert middle == [(0, 100, 0), (0, 200, 0), (200, 100, 0), (255, 255, 255)]
