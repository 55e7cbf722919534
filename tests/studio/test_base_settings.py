"""Steps and guidance of a composition that asks for none are the base's own, on every way, and the recipe says them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

import assets
import studio
from adapters.progress import Silent
from studio.cli.app import run
from studio.composition import base_settings, recipe_png, recipes, sweep
from studio.composition import job as compose
from studio.composition.schema import ComposeConfig
from studio.composition.sweep_schema import SweepConfig
from studio.datasets import seeds
from studio.training import prior, samples
from studio.training.schemas.image import TrainImageConfig
from tests import tiny
from ui.pages import compose as page

pytestmark = pytest.mark.usefixtures("nothing_kept")


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    """A tiny base whose name says that it is distilled to two steps."""
    folder = tmp_path_factory.mktemp("model")
    return tiny.saved("sd", folder).rename(folder / "tiny-turbo-2step")


def values(base: Path, **more: Any) -> dict[str, Any]:
    return {"base": str(base), "prompt": "a cat", "device": "cpu", "seed": 3, **more}


def test_a_few_step_base_is_used_as_it_was_made_for(base: Path, tmp_path: Path) -> None:
    made = {}
    for name, more in (("own", {}), ("said", {"steps": 2, "guidance_scale": 1.0}), ("other", {"steps": 3})):
        folder = tmp_path / name
        folder.mkdir()
        made[name] = Path(compose.run(ComposeConfig(**values(base, **more)), folder, Silent())["images"][0])
    recipe = {name: recipe_png.read_recipe(path) for name, path in made.items()}
    used = {name: (one["config"]["steps"], one["config"]["guidance_scale"]) for name, one in recipe.items()}
    assert used == {"own": (2, 1.0), "said": (2, 1.0), "other": (3, 1.0)}
    assert made["own"].read_bytes() == made["said"].read_bytes()
    again = recipes.replay(recipe["own"])
    assert (again.steps, again.guidance_scale) == (2, 1.0)


def test_a_repeated_recipe_keeps_its_numbers(base: Path, tmp_path: Path) -> None:
    """Also those of versions in which nothing was left open."""
    folder = tmp_path / "old"
    folder.mkdir()
    config = ComposeConfig(**values(base, steps=4, guidance_scale=5.0))
    first = Path(compose.run(config, folder, Silent())["images"][0])
    other = tmp_path / "again"
    other.mkdir()
    again = compose.run(recipes.replay(recipe_png.read_recipe(first)), other, Silent())
    assert Path(again["images"][0]).read_bytes() == first.read_bytes()


def test_plan_command_and_sweep_agree(base: Path, tmp_path: Path, capsys: Any) -> None:
    assert compose.plan(ComposeConfig(**values(base))).to_dict()["steps"] == 2
    out = tmp_path / "picture.png"
    assert run(["compose", "--base", str(base), "--prompt", "a cat", "--device", "cpu", "--out", str(out), "-q"]) == 0
    assert recipe_png.read_recipe(out)["config"]["steps"] == 2
    axes = [{"name": "seed", "values": [1, 2]}]
    swept = SweepConfig.parse({**values(base), "axes": axes, "batch": 2}, source="the test")
    for path in sweep.run(swept, tmp_path / "sweep", Silent())["images"]:
        recipe = recipe_png.read_recipe(path)
        assert (recipe["config"]["steps"], recipe["config"]["guidance_scale"]) == (2, 1.0)


def test_the_page_shows_what_the_base_decides() -> None:
    shown = [update["placeholder"] for update in page.own_settings("tinymoji")]
    assert shown == [f"{value:g}" for value in base_settings.usual("tinymoji")] == ["25", "4"]
    assert {update["placeholder"] for update in page.own_settings("someone/else")} == {"the base's own"}


def test_a_distilled_adapter_decides_where_nothing_is_said(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    plain = tiny.lora_file(tiny.sd(), tmp_path)
    marked = tmp_path / "swift.safetensors"
    made_for = {"distilled_guidance": "4.0", "distilled_steps": "3", "distilled_sampler": "lcm"}
    save_file(load_file(plain), marked, made_for)
    pipe = _Opened(tiny.FAMILIES["z-image"]())
    config = ComposeConfig(**values(base, adapters=[{"path": str(marked)}]))
    assert base_settings.decided(config, pipe) == {"steps": 3, "guidance_scale": 0.0}, "Z-Image counts from 0"
    said = config.model_copy(update={"guidance_scale": 1.0})
    assert base_settings.decided(said, pipe) == {"steps": 3}
    pipe = _Opened(tiny.sd())
    assert base_settings.decided(config, pipe) == {"steps": 3, "guidance_scale": 1.0}


def test_python_draws_as_page_and_command(tmp_path: Path) -> None:
    for name in ("tinymoji", assets.path("models/tinymoji")):
        with studio.load(name) as pipe:
            assert pipe.usual == base_settings.usual(str(name)) == (25, 4.0)
            assert pipe.for_task("image").usual == pipe.usual
    plain, said = (pipe("a flat icon of a dog", steps=2, **more).images[0] for more in ({}, {"guidance_scale": 4.0}))
    assert plain.tobytes() == said.tobytes()


def test_pictures_of_a_training_are_drawn_as_the_base_was_made_for(base: Path, tmp_path: Path) -> None:
    """Samples and class pictures alike."""
    config = TrainImageConfig(base=str(base), data="x", trigger="zxq", class_prompt="a cat")
    assert (config.sample_steps, config.sample_guidance) == (None, None)
    pipe = diffusers.DiffusionPipeline.from_pretrained(base, safety_checker=None)
    own = {"num_inference_steps": 2, "guidance_scale": 1.0, "width": 32, "height": 32}
    drawn = samples.draw_samples(pipe, ["a cat"], (32, 32), config, torch.device("cpu"))[0]
    assert drawn.tobytes() == pipe("a cat", generator=torch.Generator().manual_seed(0), **own).images[0].tobytes()
    usual = base_settings.of_pipeline(str(base), pipe)
    kept = prior.draw_class_pictures(pipe, tmp_path, "a cat", 1, (32, 32), usual, Silent())[0]
    again = pipe("a cat", generator=seeds.generator(0, "class-picture", 0), **own).images[0]
    assert Image.open(kept).tobytes() == again.tobytes()


class _Opened:
    """What is asked of an opened base."""

    def __init__(self, pipe: Any) -> None:
        from pipelines.diffusion.families import family_of

        self.pipe, self.family = pipe, family_of(pipe)
