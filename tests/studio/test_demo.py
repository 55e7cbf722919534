"""The demonstration on a tiny random model in place of the shipped one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import assets
from adapters.errors import InputError
from adapters.progress import Silent
from studio import library
from studio.cli.app import run
from studio.composition import demo, recipe_png
from tests import tiny
from tests.studio.files import diffusers_lora


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """A base model and three adapters in place of the assets."""
    place = tmp_path / "assets"
    tiny.saved("sd", place / "models").rename(place / "models" / "tinymoji")
    for seed, name in enumerate(("fox", "owl", "style-3d")):
        (place / "adapters" / name).mkdir(parents=True)
        tiny.lora_file(tiny.sd(), place / "adapters" / name, seed=seed)
        (place / "adapters" / name / "card.yaml").write_text(f"triggers: [{name.removeprefix('style-')}]")
    monkeypatch.setattr(assets, "path", lambda name: place / name)
    monkeypatch.setattr(demo, "PAIR_PROMPT", "{}, {}")  # the tiny model reads no more than 16 letters
    return place


@pytest.mark.journey
def test_every_method_side_by_side(shipped, tmp_path, capsys):
    code = run(["demo", "--out", str(tmp_path / "out"), "--steps", "1", "--json", "--quiet"])
    result = json.loads(capsys.readouterr().out)
    assert code == 0, result
    assert result["prompts"] == ["a fox, an owl", "a 3d icon of an owl"]
    labels = ["base", "fox", "owl", "activation", "composite", "merge", "output", "switch", "w-switch"]
    assert {Path(path).name for path in result["pictures"]} >= {f"1-{label}.png" for label in labels}
    assert (tmp_path / "out" / "2-k-lora.png").is_file()  # a subject in a style
    assert not (tmp_path / "out" / "2-output.png").exists()
    config = recipe_png.read_recipe(tmp_path / "out" / "1-composite.png")["config"]
    assert (config["method"], [use["name"] for use in config["adapters"]]) == ("composite", ["fox", "owl"])
    with Image.open(tmp_path / "out" / "1-output.png") as pair, Image.open(tmp_path / "out" / "2-merge.png") as single:
        assert pair.size == demo.PAIR_CANVAS
        assert single.width == single.height
    with Image.open(result["grid"]) as grid:
        assert grid.width > 6 * 128
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_scenes_use_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "path", lambda name: tmp_path / name)
    (tmp_path / "adapters").mkdir()
    for number in range(5):
        diffusers_lora(tmp_path / "adapters" / f"a{number}.safetensors")
    assert [[record.name for record in scene.pair] for scene in demo.scenes(library.adapters())] == [["a0", "a1"]]


def test_without_adapters_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "path", lambda name: tmp_path / name)
    with pytest.raises(InputError, match="which this installation does not have"):
        demo.run(tmp_path, Silent())
