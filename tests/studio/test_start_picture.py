"""Start picture, mask and ControlNet through the composition job: as diffusers draws them, the same bits from the
picture alone, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import studio
from adapters.errors import InputError
from adapters.progress import Silent
from pipelines.diffusion import MultiLoRAPipeline
from studio import jobs
from studio.cli.app import run
from studio.composition import canvas_size, pipeline_cache, recipe_png, recipes, start_picture
from studio.composition import job as compose
from studio.composition.schema import ComposeConfig
from studio.jobs import control
from tests import tiny
from tests.pipelines.conftest import PROMPT
from tests.pipelines.test_other_pipelines import controlnet, theirs

pytestmark = pytest.mark.usefixtures("nothing_kept")

SIDE = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion, two adapters and a ControlNet for it; a picture, a mask, edges."""
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny.sd()
    pipe.save_pretrained(folder / "base")
    for seed, name in ((1, "a"), (2, "b")):
        tiny.lora_file(pipe, folder, seed=seed, text_targets=(), strength=1.0).rename(folder / f"{name}.safetensors")
    controlnet("sd").save_pretrained(folder / "edges")
    noise = np.random.default_rng(5).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "start.png")
    Image.fromarray(255 - noise).save(folder / "edges.png")
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).rectangle((4, 8, 19, 23), fill=255)
    mask.save(folder / "mask.png")
    return folder


def config(model: Path, **changes: Any) -> ComposeConfig:
    adapters = [{"path": str(model / f"{name}.safetensors")} for name in "ab"]
    values = {"base": str(model / "base"), "prompt": PROMPT, "steps": 4, "device": "cpu", "seed": 4,
              "adapters": adapters, "image": str(model / "start.png")}  # fmt: skip
    return ComposeConfig.parse({**values, **changes})


def pixels(picture: Any) -> np.ndarray:
    return np.asarray(picture if isinstance(picture, Image.Image) else Image.open(picture)).astype(int)


@pytest.mark.parametrize(
    ("method", "task", "strength"),
    [("merge", "image", 0.5), ("switch", "image", 1.0), ("composite", "image", 0.75), ("activation", "image", 0.5),
     ("merge", "inpaint", 1.0), ("composite", "controlnet image", None), ("merge", "controlnet", None)],
)  # fmt: skip
def test_pictures_are_those_of_diffusers(model, tmp_path, method, task, strength):
    changes: dict[str, Any] = {"method": method, "strength": strength}
    more: dict[str, Any] = {"image": Image.open(model / "start.png")}
    if method == "activation":
        changes["regions"] = [{"adapters": ["a", "b"], "box": [0, 0, 1, 1]}]
        changes["adapters"] = [{"name": name, "path": str(model / f"{name}.safetensors")} for name in "ab"]
    if task == "inpaint":
        changes["mask"] = str(model / "mask.png")
        more |= {"mask_image": Image.open(model / "mask.png"), "width": SIDE, "height": SIDE}
    if task.startswith("controlnet"):
        changes |= {"controlnet": str(model / "edges"), "control_image": str(model / "edges.png")}
        edges = Image.open(model / "edges.png")
        more = {**more, "control_image": edges} if task.endswith("image") else {"image": edges}
        more["controlnet_conditioning_scale"] = 1.0
        changes |= {} if task.endswith("image") else {"image": ""}
    if strength is not None:
        more["strength"] = strength
    found = compose.run(config(model, **changes), tmp_path, Silent())
    parts = {"controlnet": controlnet("sd")} if task.startswith("controlnet") else {}
    pipe = MultiLoRAPipeline(tiny.sd()).for_task(task, **parts).pipe
    files = {name: model / f"{name}.safetensors" for name in "ab"}
    wanted = theirs(pipe, files, method, 4, output_type="pil", **more)[0]
    inside = pixels(model / "mask.png") > 0 if task == "inpaint" else np.ones((SIDE, SIDE), bool)
    made = pixels(found["images"][0])
    assert np.abs(made - pixels(wanted))[inside].max() <= 1
    assert (made == pixels(model / "start.png"))[~inside].all()
    bare = theirs(pipe, {}, "", 4, output_type="pil", **more)[0]
    assert np.abs(made - pixels(bare))[inside].max() > 3


def test_sd3_follows_a_controlnet(tmp_path, monkeypatch):
    """SD3's pipeline encodes the control picture, with noise that a recipe must repeat."""
    monkeypatch.chdir(tmp_path)
    pipe = tiny.sd3()
    pipe.save_pretrained("base")
    tiny.lora_file(pipe, tmp_path, text_targets=(), strength=1.0).rename("a.safetensors")
    controlnet("sd3").save_pretrained("edges")
    noise = np.random.default_rng(5).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save("edges.png")
    asked = ["compose", "--prompt", PROMPT, "--base", "base", "-l", "a.safetensors", "--steps", "4", "--seed", "4"]
    asked += ["--controlnet", "edges", "--control-image", "edges.png", "--control-scale", "0.7"]
    assert run([*asked, "--device", "cpu", "--out", "made.png"]) == 0
    stock = MultiLoRAPipeline(tiny.sd3()).for_task("controlnet", controlnet=controlnet("sd3")).pipe
    stock.load_lora_weights(tmp_path / "a.safetensors")
    torch.manual_seed(4)  # which diffusers uses for the latents of the control picture
    wanted = stock(PROMPT, control_image=Image.open("edges.png"), controlnet_conditioning_scale=0.7, guidance_scale=5.0,
                   num_inference_steps=4, generator=torch.Generator().manual_seed(4)).images[0]  # fmt: skip
    assert np.abs(pixels("made.png") - pixels(wanted)).max() <= 1
    assert run(["compose", "--from", "made.png", "--out", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("made.png").read_bytes()


@pytest.mark.parametrize("changes", [{"strength": 0.5}, {"mask": "mask.png", "controlnet": "edges"}])
def test_a_picture_repeats_from_itself_alone(model, tmp_path, changes, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"image": "start.png", **{name: text for name, text in changes.items() if name == "mask"}}
    if "controlnet" in changes:
        changes = {**changes, "controlnet": str(model / "edges"), "control_image": str(model / "edges.png")}
    for name in names.values():
        Path(name).write_bytes((model / name).read_bytes())
    first = compose.run(config(model, **{**changes, **names}), tmp_path, Silent())["images"][0]
    recipe = recipe_png.read_recipe(first)
    assert recipe["config"]["strength"] == changes.get("strength", 1.0)  # as diffusers, written down
    for name in names.values():
        Path(name).unlink()
    assert run(["compose", "--from", first, "--out", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path(first).read_bytes()
    Image.new("RGB", (SIDE, SIDE), "red").save("red.png")
    assert run(["compose", "--from", first, "--image", "red.png", "--out", "red.png"]) == 0
    assert not np.array_equal(pixels("red.png"), pixels(first))
    if "controlnet" in changes:
        recipe["controlnet"]["sha256"] = "0" * 64
        with pytest.raises(InputError, match=r"ControlNet 'edges' .* is not here"):
            recipes.replay(recipe)


def test_a_job_has_its_pictures_with_it(model, tmp_path):
    Image.open(model / "start.png").save(tmp_path / "mine.png")
    job = jobs.run_here("compose", config(model, image=str(tmp_path / "mine.png"), steps=2, strength=1), Silent())
    (tmp_path / "mine.png").unlink()
    again = jobs.get(jobs.rerun(job.id))
    jobs.delete(job.id)
    done = control.work_here(again.id, Silent())
    assert Path(done.config["image"]).parent == done.folder
    assert done.result is not None
    assert len(done.result["images"]) == 1


def test_steps_that_are_made_are_planned(model):
    schedule = [(0, 1), (0.5, 1), (0.5, 0), (1, 0)]
    uses = [{"name": "a", "path": str(model / "a.safetensors"), "schedule": schedule}]
    planned = compose.plan(config(model, adapters=uses, steps=20, strength=0.4))
    assert [step.forwards for step in planned.steps] == [1] * 8
    assert "step 0-3: a 1" in str(planned)
    assert "step 4-7: base model only" in str(planned)


def test_python_takes_pictures(model, tmp_path):
    changes = {"strength": 0.5, "base": str(model / "base"), "steps": 2, "device": "cpu"}
    uses = [str(model / "a.safetensors")]
    by_path = studio.compose(PROMPT, uses, image=model / "start.png", **changes)[0]
    assert studio.compose(PROMPT, uses, image=Image.open(model / "start.png"), **changes)[0].tobytes() == (
        by_path.tobytes()
    )


@pytest.mark.parametrize(
    ("picture", "given", "wanted"),
    [
        ((32, 32), (None, None), (32, 32)),
        ((64, 32), (None, None), (64, 32)),  # twice the base's own area is kept
        ((45, 33), (None, None), (44, 32)),  # on the grid
        ((4000, 3000), (None, None), (36, 28)),  # scaled to the base's own area
        ((10, 10), (None, None), (32, 32)),
        ((4000, 20), (None, None), (64, 16)),  # no band
        ((300, 200), (48, None), (48, 32)),
        ((300, 200), (None, 32), (48, 32)),
        ((300, 200), (40, 40), (40, 40)),
    ],
)
def test_the_canvas_follows_the_picture(model, picture, given, wanted):
    assert canvas_size.following(picture, str(model / "base"), *given) == wanted


def test_what_is_scaled_or_cut_is_said(model, tmp_path):
    turned = Image.new("RGB", (64, 32), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright: 32 wide, 64 high
    turned.save(tmp_path / "turned.jpg", exif=exif)
    deep = np.zeros((16, 16), np.uint16)
    deep[:4] = 65535
    Image.fromarray(deep).save(tmp_path / "deep.png")
    files = {"image": str(tmp_path / "turned.jpg"), "mask": str(tmp_path / "deep.png")}
    made, said = start_picture.fitted(config(model, **files))
    assert (made.width, made.height) == (32, 64)
    assert said == ["The mask of 16 x 16 was scaled to the start picture's 32 x 64."]
    assert pixels(start_picture.opened(made, "mask"))[[0, 63], 0].tolist() == [255, 0]
    assert start_picture.fitted(made) == (made, [])
    _, said = start_picture.fitted(config(model, **files, width=40, height=40))
    assert said[1:] == ["The start picture of 32 x 64 was scaled to 40 x 80 and cut to 40 x 40 around its middle.",
                        "The mask of 32 x 64 was scaled to 40 x 80 and cut to 40 x 40 around its middle."]  # fmt: skip


def test_a_sweep_starts_from_the_picture_and_says_what_was_cut(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.open(model / "start.png").resize((48, 40)).save("large.png")
    flags = ["--prompt", PROMPT, "--base", str(model / "base"), "--lora", f"a={model / 'a.safetensors'}"]
    flags += ["--width", "32", "--height", "32", "--image", "large.png", "--strength", "0.5"]
    flags += ["--steps", "4", "--guidance-scale", "1"]
    assert run(["compose", *flags, "--sweep", "a=0,1", "--out", "grid.png"]) == 0
    assert capsys.readouterr().err.count("The start picture of 48 x 40 was scaled to 38 x 32") == 1
    assert Path("grid.png").is_file()
    one = compose.run(config(model, image="large.png", strength=0.5, width=32, height=32, guidance_scale=1, seed=0,
                             adapters=[]), tmp_path, Silent())  # fmt: skip
    first = sorted((tmp_path / "home" / "jobs").glob("*/000/picture-*.png"))[0]  # the adapter at 0
    assert np.array_equal(pixels(first), pixels(one["images"][0]))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--mask", "m.png"], "give image too"),
        (["--strength", "0.5"], "give image too"),
        (["--image", "i.png", "--strength", "0"], "at strength 0 no step runs"),
        (["--image", "i.png", "--strength", "1.5"], "less than or equal to 1"),
        (["--image", "i.png"], "The start picture 'i.png' cannot be read as a picture: there is no such file"),
        (["--controlnet", "net"], "give control_image too"),
        (["--control-image", "i.png"], "give controlnet too"),
        (["--control-scale", "0.5"], "give controlnet and control_image too"),
        (["--image", "i.png", "--regions", "auto", "--method", "lora-composer"], "switch both off, or choose"),
        (["--image", "START", "--mask", "BLACK"], "The mask is empty"),
        (["--image", "START", "--controlnet", "net", "--control-image", "START", "--family", "sd3"],
         "Stable Diffusion 3 / 3.5 cannot draw with a ControlNet with a start picture"),
    ],
)  # fmt: skip
def test_wrong_pictures_are_one_sentence(model, arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("black.png")
    places = {"START": str(model / "start.png"), "BLACK": "black.png"}
    flags = ["--prompt", "a fox", "--base", str(model / "base"), "--lora", str(model / "a.safetensors")]
    assert run(["compose", *flags, *(places.get(text, text) for text in arguments)]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert pipeline_cache._kept is None, "refused before the base is loaded"


def test_a_controlnet_of_another_model_is_refused(model, tmp_path):
    from diffusers import ControlNetModel

    other = ControlNetModel.from_unet(tiny.sdxl().unet, conditioning_embedding_out_channels=(4, 8))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="is for another model"):
        MultiLoRAPipeline(tiny.sd()).for_task("controlnet", controlnet=tmp_path / "other")
    with pytest.raises(InputError, match="could not be opened"):
        MultiLoRAPipeline(tiny.sd()).for_task("controlnet", controlnet=str(tmp_path / "nothing"))
    torch.manual_seed(0)
    unet = tiny.sd().unet
    unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match="is a UNet2DConditionModel"):
        MultiLoRAPipeline(tiny.sd()).for_task("controlnet", controlnet=tmp_path / "unet")
