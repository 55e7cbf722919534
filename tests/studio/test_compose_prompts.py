"""Adapters, choices and weights in the prompt of the composition job; what its recipe says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters.errors import InputError
from adapters.progress import Silent
from studio.composition import job as compose
from studio.composition import pipeline_cache, prompts, recipe_png, recipes
from studio.composition.schema import ComposeConfig
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion and two adapters for it."""
    folder = tmp_path_factory.mktemp("model")
    tiny.saved("sd", folder)
    for seed, name in ((1, "cat"), (2, "dog")):
        tiny.lora_file(tiny.sd(), folder, seed=seed).rename(folder / f"{name}.safetensors")
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "wildcards").mkdir(parents=True)
    (tmp_path / "home" / "wildcards" / "colour.txt").write_text("red\nblue\n", encoding="utf-8")
    pipeline_cache.release()
    return tmp_path / "home"


def config(model: Path, prompt: str, **values: Any) -> ComposeConfig:
    return ComposeConfig.parse(
        {"base": str(model / "tiny-sd-0"), "prompt": prompt, "steps": 2, "device": "cpu", **values}
    )


def used(file: str) -> dict[str, Any]:
    return recipe_png.read_recipe(file)


def made(config: ComposeConfig, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    return compose.run(config, folder, Silent())


def test_an_adapter_in_the_prompt_is_one_beside_it(model: Path, tmp_path: Path) -> None:
    cat = model / "cat.safetensors"
    beside = made(config(model, "a fox", adapters=[{"path": str(cat), "weight": 0.5}]), tmp_path / "a")
    inside = made(config(model, f"a fox <lora:{cat}:0.5>"), tmp_path / "b")
    over = made(config(model, "a fox <lora:cat:0.5>", adapters=[{"path": str(cat), "weight": 2}]), tmp_path / "c")
    pixels = [Path(result["images"][0]) for result in (beside, inside, over)]
    from PIL import Image

    first, *others = [Image.open(path).tobytes() for path in pixels]
    assert others == [first, first]
    assert beside["remarks"] == []
    assert "acts at 0.5" in inside["remarks"][0]
    assert "2 was given" in over["remarks"][0]
    recipe = used(inside["images"][0])
    assert recipe["config"]["prompt"] == "a fox"
    assert recipe["written"] == {"prompt": f"a fox <lora:{cat}:0.5>"}
    assert [(entry["name"], entry["sha256"]) for entry in recipe["adapters"]] == [
        ("cat", used(beside["images"][0])["adapters"][0]["sha256"])
    ]
    with pytest.raises(InputError, match="no adapter"):
        compose.run(config(model, "a <lora:zebra:1>"), tmp_path, Silent())


def test_choices_by_seed_are_in_the_recipe_and_repeat_without_the_files(
    model: Path, home: Path, tmp_path: Path
) -> None:
    cat, dog = model / "cat.safetensors", model / "dog.safetensors"
    text = f"a (__colour__:1.5) {{fox <lora:{cat}:1>|hen <lora:{dog}:0.5>}}"
    result = made(config(model, text, images=4), tmp_path / "a")
    recipes_of = [used(path) for path in result["images"]]
    prompts_of = [recipe["config"]["prompt"] for recipe in recipes_of]
    assert len(set(prompts_of)) > 1
    assert all("{" not in prompt and "__" not in prompt for prompt in prompts_of)
    for recipe, prompt in zip(recipes_of, prompts_of, strict=True):
        wanted = ("cat", 1.0) if "fox" in prompt else ("dog", 0.5)
        assert [(use["name"], use["weight"]) for use in recipe["config"]["adapters"]] == [wanted]
        assert recipe["written"] == {"prompt": text}
        assert recipe["emphasis"]["prompt"] == [["red" if "red" in prompt else "blue", 1.5]]
    (home / "wildcards" / "colour.txt").unlink()
    again = made(recipes.replay(recipes_of[2]), tmp_path / "b")
    from PIL import Image

    assert Image.open(again["images"][0]).tobytes() == Image.open(result["images"][2]).tobytes()


def test_long_prompts_are_remarked(model: Path, tmp_path: Path) -> None:
    result = made(config(model, "a fox in the snow with a hat"), tmp_path / "a")
    assert result["remarks"] == [
        "The prompt is longer than the text encoder reads at once: encoded in 2 chunks.",
    ]


def test_plain_texts_have_nothing_to_tell(model: Path) -> None:
    plain = config(model, "a fox")
    assert prompts.told(plain, plain) == {}
    assert not prompts.open_choices(plain)
