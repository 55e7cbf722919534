"""Recipes in pictures: whole, exact, and refused where a file is missing or another one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from adapters.errors import InputError
from studio import library
from studio.composition import recipe_png, recipes
from studio.composition.schema import AdapterUse, ComposeConfig
from tests.studio.files import diffusers_lora

MADE_ON = {"device": "cpu", "dtype": "fp32", "threads": 1}

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
number = st.floats(-3, 3).filter(math.isfinite)
schedule = st.lists(st.tuples(st.floats(0, 1), number), max_size=3).map(sorted)
uses = st.builds(AdapterUse, path=text, weight=number, triggers=st.lists(text, max_size=2), schedule=schedule)
configs = st.builds(
    ComposeConfig,
    prompt=text,
    negative_prompt=text,
    adapters=st.lists(uses, max_size=3),
    seed=st.integers(0, 2**63),
    guidance_scale=st.floats(0, 30),
    width=st.none() | st.integers(8, 4096),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs)
def test_any_configuration_survives_in_a_picture(tmp_path, config):
    recipe = {"version": 1, "job": "compose", "config": config.model_dump(mode="json")}
    path = recipe_png.save_png(Image.new("RGB", (8, 8), "red"), tmp_path / "a.png", recipe)
    assert recipe_png.read_recipe(path) == recipe
    assert ComposeConfig.parse(recipe_png.read_recipe(path)["config"]) == config
    with Image.open(path) as picture:
        assert picture.getpixel((0, 0)) == (255, 0, 0)
    assert [file.name for file in tmp_path.iterdir()] in (["a.png"], ["home", "a.png"], ["a.png", "home"])


def odd_pictures(folder: Path) -> dict[str, str]:
    Image.new("RGB", (4, 4)).save(folder / "plain.png")
    Image.new("RGB", (4, 4)).save(folder / "plain.jpg")
    (folder / "text.png").write_text("hello")
    (folder / "list.json").write_text("[]")
    (folder / "half.json").write_text("{")
    return {
        "plain.png": "has no recipe",
        "plain.jpg": "has no recipe",
        "text.png": "no readable picture",
        "list.json": "damaged: it has no 'config'",
        "half.json": "damaged: it is not JSON",
        "none.png": "does not exist",
    }


def test_pictures_without_a_recipe_are_refused(tmp_path):
    for name, sentence in odd_pictures(tmp_path).items():
        with pytest.raises(InputError, match=sentence):
            recipe_png.read_recipe(tmp_path / name)


@pytest.fixture
def adapter(tmp_path) -> Path:
    return diffusers_lora(tmp_path / "cat.safetensors", seed=1)


@pytest.fixture
def base(tmp_path) -> Path:
    place = tmp_path / "base"
    place.mkdir()
    (place / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return place


@pytest.fixture
def recipe(adapter, base):
    config = ComposeConfig(prompt="x", base=str(base), adapters=[AdapterUse(name="cat", path=str(adapter))], images=3)
    return json.loads(json.dumps(recipes.build(config, MADE_ON)))


def test_a_recipe_says_which_files_and_versions(recipe, adapter):
    (entry,) = recipe["adapters"]
    assert entry["sha256"] == library.sha256(adapter)
    assert entry["name"] == "cat"
    assert recipe["base"]["sha256"]
    assert {"python", "torch", "diffusers"} <= set(recipe["versions"])
    assert recipe["made_on"] == MADE_ON
    one = recipes.for_picture(recipe, 5)["config"]
    assert (one["seed"], one["images"]) == (5, 1)


def test_replay_is_the_same_configuration(recipe):
    assert recipes.replay(recipe) == ComposeConfig.parse(recipe["config"])
    assert recipes.replay(recipe, {"seed": 9}).seed == 9


def test_no_persons_name_travels_in_a_picture(monkeypatch, tmp_path, adapter, base):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    config = ComposeConfig(base=str(base), adapters=[AdapterUse(path=str(adapter))])
    assert recipes.build(config, MADE_ON)["adapters"][0]["path"] == "~/cat.safetensors"


def test_a_changed_adapter_is_refused(recipe, adapter):
    diffusers_lora(adapter, seed=2)
    with pytest.raises(InputError, match=r"The adapter 'cat' at .*cat.safetensors is another file \(\w{12}\)"):
        recipes.replay(recipe)
    assert recipes.replay(recipe, {"adapters": []}).adapters == []


def test_a_missing_adapter_is_refused(recipe, adapter):
    adapter.unlink()
    with pytest.raises(InputError, match="is neither at its place nor in the library: put the original back"):
        recipes.replay(recipe)


def test_the_same_file_under_another_name_will_do(recipe, adapter):
    library.import_adapter(adapter, "renamed")
    adapter.unlink()
    assert recipes.replay(recipe).adapters[0].path == "renamed"


def test_another_base_is_refused(recipe, base):
    (base / "unet.txt").write_text("new")
    with pytest.raises(InputError, match=r"The base model '.*' is another one than the recipe's"):
        recipes.replay(recipe)
    assert recipes.replay(recipe, {"base": "other"}).base == "other"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"job": "train-image"}, "recipe of a 'train-image' job"), ({"version": 99}, "newer Adapter Studio"),
     ({"adapters": []}, "does not say which files")],
)  # fmt: skip
def test_other_recipes_are_refused(recipe, change, sentence):
    with pytest.raises(InputError, match=sentence):
        recipes.replay({**recipe, **change})
