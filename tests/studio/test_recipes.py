"""Recipes in pictures: whole, exact, and refused where a file is missing or another one."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from adapters.errors import InputError
from studio import library
from studio.composition import canvas_size, job, recipe_png, recipes
from studio.composition.schema import AdapterUse, ComposeConfig
from tests.studio.files import diffusers_lora, peft_lora

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


def empty_png(path: Path, width: int, height: int) -> None:
    """A PNG whose header alone promises so many pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def odd_pictures(folder: Path) -> dict[str, str]:
    Image.new("RGB", (4, 4)).save(folder / "plain.png")
    Image.new("RGB", (4, 4)).save(folder / "plain.jpg")
    (folder / "text.png").write_text("hello")
    (folder / "list.json").write_text("[]")
    (folder / "half.json").write_text("{")
    (folder / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    (folder / "nested.json").write_text('{"config": {"a": ' + "[" * 60 + "]" * 60 + "}}")
    (folder / "digits.json").write_text('{"config": {"seed": ' + "1" * 10_000 + "}}")
    empty_png(folder / "huge.png", 60_000, 60_000)
    return {
        "plain.png": "has no recipe",
        "plain.jpg": "has no recipe",
        "text.png": "cannot be read as a picture",
        "list.json": "damaged: it has no 'config'",
        "half.json": "damaged: it is not JSON",
        "deep.json": "deeper than any recipe's",
        "nested.json": "deeper than any recipe's",
        "digits.json": "damaged: it is not JSON",
        "huge.png": "too many pixels",
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


def test_replay_is_the_same_configuration(recipe, adapter, base):
    own = {**recipe["config"], "base": str(base)}
    own["adapters"] = [{**own["adapters"][0], "path": str(adapter)}]
    assert recipes.replay(recipe) == ComposeConfig.parse(own)
    assert recipes.replay(recipe, {"seed": 9}).seed == 9


def test_recipes_of_earlier_versions_are_found_at_their_place(recipe, adapter, base, tmp_path, monkeypatch):
    old = {**recipe, "base": {**recipe["base"], "name": str(base), "path": str(base)}}
    old["adapters"] = [{**recipe["adapters"][0], "path": str(adapter)}]
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "new home"))  # which has seen no file yet
    found = recipes.replay(old)
    assert (found.adapters[0].path, found.base) == (str(adapter), str(base))


def test_recipes_hold_names_and_no_folders(recipe, tmp_path):
    assert str(tmp_path) not in json.dumps(recipe)
    assert recipe["config"]["adapters"][0]["path"] == "cat.safetensors"
    assert recipe["config"]["base"] == recipe["base"]["name"] == "base"


def test_a_directory_of_peft_is_found_as_a_whole(tmp_path, base):
    place = peft_lora(tmp_path / "tone")
    config = ComposeConfig(base=str(base), adapters=[AdapterUse(path=str(place))])
    recipe = recipes.build(config, MADE_ON)
    assert recipe["config"]["adapters"][0]["path"] == "tone"
    assert recipes.replay(recipe).adapters[0].path == str(place)


def test_names_of_the_library_and_hub_ids_stay(tmp_path, adapter):
    library.import_adapter(adapter, "mine")
    config = ComposeConfig(base="someone/model", adapters=[AdapterUse(path="mine")])
    recipe = recipes.build(config, MADE_ON)
    assert (recipe["config"]["adapters"][0]["path"], recipe["config"]["base"]) == ("mine", "someone/model")
    assert recipes.replay(recipe) == config


def test_a_moved_base_is_found_in_the_library(recipe, base):
    library.import_base(base, "moved")
    shutil.rmtree(base)
    assert recipes.replay(recipe).base == "moved"


def test_a_changed_adapter_is_refused(recipe, adapter):
    diffusers_lora(adapter, seed=2)
    with pytest.raises(InputError, match=r"The adapter 'cat' at .*cat.safetensors is a different file \(\w{12}\)"):
        recipes.replay(recipe)
    assert recipes.replay(recipe, {"adapters": []}).adapters == []


def test_a_missing_adapter_is_refused(recipe, adapter):
    adapter.unlink()
    with pytest.raises(InputError, match="is neither at its old place nor in the library: put the original back"):
        recipes.replay(recipe)


def test_the_same_file_under_another_name_will_do(recipe, adapter):
    library.import_adapter(adapter, "renamed")
    adapter.unlink()
    assert recipes.replay(recipe).adapters[0].path == "renamed"


def test_another_base_is_refused(recipe, base):
    (base / "unet.txt").write_text("new")
    with pytest.raises(InputError, match=r"The base model '.*' is not the recipe's"):
        recipes.replay(recipe)
    assert recipes.replay(recipe, {"base": "other"}).base == "other"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"job": "train-image"}, "recipe of a 'train-image' job"), ({"version": 99}, "newer Adapter Studio"),
     ({"adapters": []}, "does not identify its adapters' files")],
)  # fmt: skip
def test_other_recipes_are_refused(recipe, change, sentence):
    with pytest.raises(InputError, match=sentence):
        recipes.replay({**recipe, **change})


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("memory", ["none", "low"])
def test_a_picture_beyond_the_memory_is_refused_with_the_largest_that_fits(memory):
    config = ComposeConfig(base="tinymoji", width=100_000_000, height=4096, memory=memory)
    with pytest.raises(
        InputError, match=r"at least [\d,]+ GB of memory, there are [\d,]+: .*could fit is \d+ x \d+,"
    ) as refused:
        job.settled(config)
    width, height = map(int, re.search(r"could fit is (\d+) x (\d+)", str(refused.value)).groups())
    canvas_size.check_fits(config.model_copy(update={"width": width, "height": height}))
    with pytest.raises(InputError):
        canvas_size.check_fits(config.model_copy(update={"width": width + width // 50, "height": height}))


def test_usual_sizes_are_tried():
    for side in (None, 64, 512, 2048):
        canvas_size.check_fits(ComposeConfig(width=side, height=side))
