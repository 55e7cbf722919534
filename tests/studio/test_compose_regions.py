"""Regions through the composition job and the command: the same bits again, the plan, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from adapters.errors import InputError
from adapters.progress import Silent
from studio.cli.app import run
from studio.composition import job as compose
from studio.composition import pipeline_cache, recipe_png, recipes, region_option
from studio.composition.schema import ComposeConfig
from tests import tiny

pytestmark = pytest.mark.usefixtures("nothing_kept")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion, two adapters for it, and a mask."""
    folder = tmp_path_factory.mktemp("model")
    tiny.saved("sd", folder)
    for seed, name in ((1, "cat"), (2, "dog")):
        tiny.lora_file(tiny.sd(), folder, seed=seed).rename(folder / f"{name}.safetensors")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(folder / "right.png")
    return folder


def config(model: Path, **changes: object) -> ComposeConfig:
    values = {
        "base": str(model / "tiny-sd-0"), "prompt": "a cat and a dog", "steps": 3, "device": "cpu",
        "method": "activation",
        "adapters": [{"name": name, "path": str(model / f"{name}.safetensors")} for name in ("cat", "dog")],
        "regions": [
            {"box": [0, 0, 0.5, 1], "adapters": ["cat"], "prompt": "a cat"},
            {"mask": str(model / "right.png"), "adapters": ["dog"], "prompt": "a dog"},
        ],
    }  # fmt: skip
    return ComposeConfig.parse({**values, **changes})


@pytest.mark.parametrize(
    ("method", "changes"),
    [("activation", {}), ("output", {}), ("lora-composer", {"refine": True})],
)
def test_a_recipe_repeats_without_the_masks_file(model, tmp_path, method, changes):
    mask = tmp_path / "mask.png"
    mask.write_bytes((model / "right.png").read_bytes())
    regions = [
        {"box": [0, 0, 0.5, 1], "adapters": ["cat"], "prompt": "a cat", "words": ["cat"]},
        {"mask": str(mask), "adapters": ["dog"], "prompt": "a dog", "words": ["dog"]},
    ]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = compose.run(config(model, method=method, regions=regions, **changes), tmp_path / "a", Silent())
    mask.unlink()
    pipeline_cache.release()
    again = compose.run(recipes.replay(recipe_png.read_recipe(first["images"][0])), tmp_path / "b", Silent())
    assert Path(again["images"][0]).read_bytes() == Path(first["images"][0]).read_bytes()
    assert first["regions"][0] == {"name": "cat", "box": [0, 0, 0.5, 1], "mask": None}
    assert Image.open(first["regions"][1]["mask"]).getextrema() == (0, 255)


def test_the_command_from_flags_to_the_same_picture(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--base", str(model / "tiny-sd-0"), "--steps", "3", "--prompt", "a cat and a dog"]
    for name in ("cat", "dog"):
        flags += ["--lora", f"{name}={model / name}.safetensors"]
    places = ["--region", "left=cat*0.8@0-0.7: a cat", "--region", f"{model / 'right.png'}=dog: a dog"]
    assert run(["compose", *flags, *places, "--plan"]) == 0
    said = capsys.readouterr().out
    assert "activation of cat, dog" in said
    assert "region cat: box 0, 0, 0.5, 1; cat x 0.8 by schedule; 'a cat'" in said
    assert "region dog: mask; dog; 'a dog'" in said
    assert run(["compose", *flags, *places, "--out", "one.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["regions"][1]["name"] == "dog"
    assert run(["compose", "--from", "one.png", "--out", "two.png"]) == 0
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    Path("layout.yaml").write_text(
        "method: cross\nregions:\n- {box: [0, 0, 0.5, 1], adapters: [cat]}\n", encoding="utf-8"
    )
    assert run(["compose", "--from", "one.png", "--regions", "layout.yaml", "--plan"]) == 0
    assert "cross of cat, dog" in capsys.readouterr().out
    assert run(["compose", "--from", "one.png", "--regions", "none", "--plan"]) == 0
    assert "merge of cat, dog" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--region", "fox"], "--region needs PLACE=ADAPTER"),
        (["--region", "0,0,1=fox"], "a box is four numbers"),
        (["--region", "0,0,2,1=fox"], "regions.0.box: a box is x0, y0, x1, y1 between 0 and 1"),
        (["--region", "nowhere.png=fox"], "is not a mask picture, a box"),
        (["--region", "left=fox@0.9-0.1"], "must rise and be between 0 and 1"),
        (["--region", "left=fox", "--regions", "auto"], "not both"),
        (["--region", "left=fox", "--method", "merge"], "'merge' has no regions"),
        (["--method", "cross"], "'cross' needs regions"),
        (["--regions", "nothing.yaml"], "does not exist"),
        (["--regions", "auto", "--method", "switch"], "'switch' has no regions"),
        (["--region", "left=nobody: a fox"], "nobody"),
        (["--lora", "fox#leftt"], "--lora 'fox#leftt': 'leftt' is not a mask picture"),
        (["--lora", "fox#left", "--regions", "auto"], "not both"),
        (["--lora", "fox#left", "--method", "merge"], "'merge' has no regions"),
    ],
)
def test_wrong_regions_are_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["compose", *arguments, "--plan"]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_a_region_in_one_word():
    assert region_option.parse("0, .25, .5,1=fox+clay*0.5: a fox: red") == {
        "box": [0.0, 0.25, 0.5, 1.0], "adapters": ["fox", "clay"], "scale": 0.5, "prompt": "a fox: red",
    }  # fmt: skip
    assert region_option.parse("2/3=fox") == {"box": [1 / 3, 0.0, 2 / 3, 1.0], "adapters": ["fox"]}
    with pytest.raises(InputError, match="counted from 1 to 3"):
        region_option.of_adapter("fox#0/3")
    assert region_option.parse("top=fox") == {"box": [0.0, 0.0, 1.0, 0.5], "adapters": ["fox"]}


def test_an_adapter_with_its_place(model, capsys):
    flags = ["--base", str(model / "tiny-sd-0"), "--prompt", "a cat and a dog", "--region", "right=dog: a dog"]
    adapters = [
        "--lora",
        f"{model / 'cat'}.safetensors:0.5@0-0.4#0,0,.5,1",
        "--lora",
        f"dog={model / 'dog'}.safetensors",
    ]
    assert run(["compose", *flags, *adapters, "--plan"]) == 0
    said = capsys.readouterr().out
    assert "region cat: box 0, 0, 0.5, 1; cat; the whole prompt" in said
    assert "region dog: box 0.5, 0, 1, 1; dog; 'a dog'" in said
    assert region_option.of_adapter("cat:0.5#top") == (
        {"name": "cat", "path": "cat", "weight": 0.5}, {"box": [0.0, 0.0, 1.0, 0.5], "adapters": ["cat"]},
    )  # fmt: skip


def test_transparent_paint_is_a_mask(tmp_path):
    from pipelines.diffusion.regions.pictures import open_mask
    from pipelines.pictures import as_uri

    paint = Image.new("RGBA", (8, 8))
    paint.paste((10, 20, 30, 255), (0, 0, 4, 8))
    mask = open_mask(paint)
    assert [mask.getpixel((x, 0)) for x in (0, 7)] == [255, 0]
    assert open_mask(as_uri(mask)).tobytes() == mask.tobytes()
    with pytest.raises(InputError, match="is empty"):
        open_mask(Image.new("L", (8, 8)))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        open_mask(tmp_path / "broken.png")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        open_mask("data:image/png;base64,@@@")


def test_an_adapter_given_twice_adds_up_and_with_places_is_one_adapter_in_two_regions():
    assert region_option.of_adapters(["cat:0.5#left", "cat:0.25#right", "dog"]) == (
        [{"path": "cat", "weight": 0.5, "name": "cat"}, {"path": "dog"}],
        [{"box": [0.0, 0.0, 0.5, 1.0], "adapters": ["cat"]},
         {"box": [0.5, 0.0, 1.0, 1.0], "adapters": ["cat"], "scale": 0.5}],
    )  # fmt: skip
    with pytest.raises(InputError, match="strength other than 0"):
        region_option.of_adapters(["cat:0#left", "cat#right"])
    twice = ComposeConfig.parse({"adapters": [{"path": "cat", "weight": 0.5}, {"path": "cat", "te_weight": 0.2},
                                              {"path": "cat", "schedule": [[0, 1], [1, 0]]}]})  # fmt: skip
    assert [(use.weight, use.te_weight) for use in twice.adapters] == [(1.5, 0.7), (1.0, None)]


def test_an_adapter_given_twice_draws_what_it_draws_at_the_sum(model, tmp_path):
    path = str(model / "cat.safetensors")
    pictures = []
    for number, weights in enumerate(((0.75,), (0.5, 0.25))):
        given = config(model, method="merge", regions=[], adapters=[{"path": path, "weight": w} for w in weights])
        (folder := tmp_path / str(number)).mkdir()
        pictures.append(Image.open(compose.run(given, folder, Silent())["images"][0]).tobytes())
    assert pictures[0] == pictures[1]
