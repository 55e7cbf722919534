"""Videos through the composition job: files that play, beside the picture with the recipe; what the pages show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adapters.errors import InputError, MissingDependencyError
from adapters.progress import Silent
from pipelines import videos
from pipelines.diffusion.families import FAMILIES
from studio.cli.app import run
from studio.composition import canvas_size, gallery, recipe_png, recipes
from studio.composition import job as compose
from studio.composition.schema import ComposeConfig
from studio.library import facts
from tests import tiny
from tests.pipelines.conftest import PROMPT

pytestmark = pytest.mark.usefixtures("nothing_kept")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan 2.2 A14B and the two halves of an adapter for it."""
    folder = tmp_path_factory.mktemp("model")
    pipe = FAMILIES["wan"].tiny(boundary_ratio=0.8)
    pipe.save_pretrained(folder / "base")
    for seed, name in ((1, "fox_high_noise"), (2, "fox_low_noise")):
        tiny.lora_file(pipe, folder, seed=seed, strength=1.0).rename(folder / f"{name}.safetensors")
    return folder


def config(model: Path, **changes: Any) -> ComposeConfig:
    values = {"base": str(model / "base"), "prompt": PROMPT, "steps": 4, "device": "cpu", "seed": 4, "frames": 5,
              "width": 64, "height": 32, "adapters": [{"path": str(model / "fox_high_noise.safetensors")}]}  # fmt: skip
    return ComposeConfig.parse({**values, **changes})


def test_a_video_and_its_picture(model: Path, tmp_path: Path) -> None:
    import cv2

    result = compose.run(config(model, fps=8), tmp_path, Silent())
    assert result["videos"] == [str(tmp_path / "video-4.mp4")]
    assert result["images"] == [str(tmp_path / "picture-4.png")]
    assert videos.count(tmp_path / "video-4.mp4") == 5
    played = cv2.VideoCapture(result["videos"][0])
    assert played.get(cv2.CAP_PROP_FPS) == 8
    frames = []
    while (read := played.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB).astype(int))
    middle = np.asarray(Image.open(result["images"][0]).convert("RGB")).astype(int)
    assert frames[2].shape == middle.shape == (32, 64, 3)
    assert np.abs(frames[2] - middle).mean() < 25  # compressed: random networks make hard pictures
    recipe = recipe_png.read_recipe(result["images"][0])
    assert (recipe["config"]["frames"], recipe["config"]["fps"]) == (5, 8)
    again = compose.run(recipes.replay(recipe), tmp_path / "again", Silent())
    assert np.array_equal(np.asarray(Image.open(again["images"][0])), np.asarray(Image.open(result["images"][0])))


def test_what_is_refused(model: Path, tmp_path: Path) -> None:
    for changes, sentence in (
        ({"frames": 6}, "multiple of 4 plus 1"),
        ({"height": 40}, "multiple of 16"),
        ({"mask": "m.png", "image": "i.png"}, "cannot draw with a mask: it can with a start picture"),
    ):
        with pytest.raises(InputError, match=sentence):
            compose.run(config(model, **changes), tmp_path, Silent())
    still = {"base": "tinymoji", "adapters": [], "width": None, "height": None}
    for changes in ({"fps": 8, "frames": None}, {}):
        with pytest.raises(InputError, match="makes pictures: leave"):
            compose.run(config(model, **still, **changes), tmp_path, Silent())
    with pytest.raises(InputError, match="at least one frame"):
        videos.write([], tmp_path / "x.mp4", 16)


def test_without_an_encoder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "_has", lambda package: False)
    with pytest.raises(MissingDependencyError, match=r"Writing a video needs .* pip install 'adapter-studio\[video\]'"):
        videos.write([Image.new("RGB", (16, 16))], tmp_path / "x.mp4", 16)
    with pytest.raises(MissingDependencyError, match="Writing a video"):  # before the work, not after it
        compose.run(config(model), tmp_path, Silent())


def test_the_base_is_known(model: Path) -> None:
    assert facts.base(model / "base")["family"] == "wan"
    assert canvas_size.size(str(model / "base")) == (832, 480)
    assert canvas_size.grid(str(model / "base")) == 16


def test_commands_and_pages(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["studio"])
    words = ["compose", "--base", str(model / "base"), "--prompt", PROMPT, "--steps", "2", "--frames", "5",
             "--width", "32", "--height", "32", "--device", "cpu", "--quiet",
             "--out", str(tmp_path / "a.mp4")]  # fmt: skip
    assert run(words) == 0
    assert videos.count(tmp_path / "a.mp4") == 5
    (kept,) = gallery.pictures()
    assert kept.video is not None
    assert kept.video.name == "video-0.mp4"
    from studio import jobs
    from ui.pages import compose as page
    from ui.pages import gallery as gallery_page
    from ui.pages import jobs as jobs_page

    job = jobs.get(kept.job)
    assert page.captioned(job, page.made(job)) == [str(kept.video)]
    assert "<video" in gallery_page._panel(kept, None, False)
    assert jobs_page.describe(job).count("<video") == 1
    assert jobs_page.pictures_of(job) == [], "it plays above already"
    gallery.delete(kept.key)
    assert not kept.video or not kept.path.exists()
    assert not list(job.folder.glob("*.mp4"))


def test_both_halves_come_into_the_library(model: Path, tmp_path: Path) -> None:
    from studio import library

    record = library.import_adapter(model / "fox_low_noise.safetensors")
    assert record.name == "fox_low_noise"
    named = library.import_adapter(model / "fox_high_noise.safetensors", "red")
    assert {one.name for one in library.adapters()} >= {
        "fox_low_noise", "fox_high_noise", named.name, "red_low_noise"
    }  # fmt: skip
    one = config(model, adapters=[{"path": "red_low_noise"}], frames=1, steps=2)
    both = compose.run(one, tmp_path / "both", Silent())
    half = {"path": "red_low_noise", "denoiser": "transformer_2"}
    alone = compose.run(config(model, adapters=[half], frames=1, steps=2), tmp_path / "half", Silent())
    drawn = [np.asarray(Image.open(result["images"][0])) for result in (both, alone)]
    assert not np.array_equal(*drawn)


def test_a_foreign_file_converts_with_the_base(model: Path, tmp_path: Path) -> None:
    from adapters.formats import read
    from studio.adapter_files.fit_to_base import fitted
    from tests.pipelines.test_wan import foreign

    file = foreign(model / "fox_low_noise.safetensors", tmp_path / "x.safetensors", True, "lora_up", 4.0)
    (made,) = fitted([read(file)], str(model / "base"))
    wanted = read(model / "fox_low_noise.safetensors").parts["transformer"]
    assert set(made.parts["transformer"]) == set(wanted)
    for name, layer in made.parts["transformer"].items():
        assert np.allclose(layer.delta(), wanted[name].delta(), atol=1e-6)
