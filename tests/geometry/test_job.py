"""The job and the command on the shipped model and scene, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import assets
from adapters.errors import Cancelled, InputError
from adapters.progress import Progress, Silent
from studio import jobs
from studio.cli.app import run
from studio.reconstruction import job as reconstruct
from studio.reconstruction.schema import ReconstructConfig
from tests.studio.conftest import home

__all__ = ["home"]

PICTURES = sorted(str(file) for file in assets.path("scenes/room").glob("*.png"))[::2]


def config(**values: Any) -> ReconstructConfig:
    return ReconstructConfig(**{"images": PICTURES, "steps": 6, "epochs": 1, "device": "cpu", **values})


def test_calibrate_then_use_the_adapter_again_and_export_anew(tmp_path: Path) -> None:
    done = reconstruct.run(config(calibrate=True, rank=2), tmp_path / "a", Silent())
    assert (done["images"], done["pairs"], done["encodings"]) == (4, 12, 4)
    scene = json.loads((tmp_path / "a/adapter/scene.json").read_text())
    assert len(scene["images"]) == 4
    assert str(Path(PICTURES[0]).parent) not in json.dumps(scene)
    assert scene["base"]["licence"] == "Apache-2.0"
    again = reconstruct.run(config(adapter=done["adapter"]), tmp_path / "b", Silent())
    assert [c["focal"] for c in again["cameras"]] == [c["focal"] for c in done["cameras"]]
    for kind in ("ply", "colmap", "nerfstudio", "npz"):
        made = reconstruct.export(done["scene"], tmp_path / f"x-{kind}", kind, percentile=50)
        assert made.place.exists()
        assert made.points > 0


class _StopAtPairs(Silent):
    stop = False

    def report(self, progress: Progress) -> None:
        self.stop = progress.stage == "align"

    def cancelled(self) -> bool:
        return self.stop


def test_a_cancelled_job_leaves_no_half_written_file(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        reconstruct.run(config(), tmp_path, _StopAtPairs())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": []}, "no pictures"),
        ({"images": PICTURES[:2], "calibrate": True}, "at least three different pictures"),
        ({"images": ["nowhere.png"]}, "no picture 'nowhere.png'"),
        ({"model": "naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt"}, "accept-licence"),
        ({"calibrate": True, "adapter": "x"}, "not both"),
        ({"adapter": "nowhere"}, "contains no PEFT adapter"),
        ({"graph": "star"}, "Unknown pair graph"),
        ({"graph": "swin-9"}, "allow windows up to 'swin-3'"),
        ({"also": ["x"]}, "only for training the adapter: add --calibrate"),
        ({"calibrate": True, "also": ["nowhere"]}, "no folder 'nowhere'"),
        ({"calibrate": True, "images": [PICTURES[0]] * 3}, "at least three different pictures"),
    ],
)
def test_bad_input_is_a_sentence(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        reconstruct.run(config(**values), tmp_path, Silent())


def test_one_picture_several_times_is_said(tmp_path: Path) -> None:
    done = reconstruct.run(config(images=[PICTURES[0]] * 3), tmp_path, Silent())
    assert "Some pictures are the same file." in done["warnings"]


def test_pictures_turned_by_the_camera_are_exported_upright_by_the_command(
    home: Path, tmp_path: Path, capsys: Any
) -> None:
    files = []
    for n, picture in enumerate(PICTURES[:3]):
        exif = Image.Exif()
        exif[0x112] = 6 if n else 1
        with Image.open(picture) as opened:
            stored = opened.convert("RGB").resize((64, 48) if n == 0 else (48, 64))
        files.append(tmp_path / f"photo {n}.jpg")
        (stored.transpose(Image.Transpose.ROTATE_90) if n else stored).save(files[-1], exif=exif)
    code, said, error = ask(capsys, *files, "--no-verify", "--out", f"colmap:{tmp_path}/sparse", "--json")
    assert code == 0, error
    assert any("'photo 0.jpg' as photo_0.jpg" in text for text in json.loads(said)["warnings"])
    for row in (tmp_path / "sparse/cameras.txt").read_text().splitlines()[1:]:
        number, _, width, height, *_ = row.split()
        with Image.open(tmp_path / f"sparse/images/photo_{int(number) - 1}.jpg") as picture:
            assert picture.size == (int(width), int(height))


@pytest.mark.parametrize("count", [1, 2])
def test_one_and_two_pictures_work_without_alignment(count: int, tmp_path: Path) -> None:
    done = reconstruct.run(config(images=PICTURES[:count]), tmp_path, Silent())
    assert Path(done["glb"]).read_bytes()[:4] == b"glTF"
    assert done["loss"] is None


# ------------------------------------------------------------------------------------------------ several scenes


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two scenes' folders of three pictures each."""
    for name, chosen in (("hall", PICTURES[:3]), ("attic", PICTURES[1:])):
        (tmp_path / name).mkdir()
        for file in chosen:
            shutil.copy(file, tmp_path / name)
    (tmp_path / "hall/notes.txt").write_text("not a picture")
    return [tmp_path / "hall", tmp_path / "attic"]


def ask(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    fast = ["--steps", "4", "--epochs", "1", "--rank", "2", "--device", "cpu", "--mu", "1", "--cutoff", "0.01"]
    code = run(["reconstruct", *map(str, arguments), *fast])
    return code, *capsys.readouterr()


def test_each_folder_is_a_scene_with_its_own_adapter_and_files(
    home: Path, folders: list[Path], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    code, said, _ = ask(capsys, *folders, "--calibrate", "--out", out / "scene.glb", "--json")
    assert code == 0
    hall, attic = json.loads(said)["scenes"]
    assert (hall["name"], attic["name"]) == ("hall", "attic")
    assert hall["adapter"] != attic["adapter"]
    assert [camera["picture"] for camera in hall["cameras"]] == [Path(file).name for file in PICTURES[:3]]
    assert [camera["picture"] for camera in attic["cameras"]] == [Path(file).name for file in PICTURES[1:]]
    assert sorted(file.relative_to(out).as_posix() for file in out.rglob("*.glb")) == [
        "attic/scene.glb", "hall/scene.glb"
    ]  # fmt: skip


def test_several_scenes_may_share_one_adapter(home: Path, folders: list[Path], capsys: Any) -> None:
    code, said, _ = ask(capsys, *folders, "--calibrate", "--one-adapter", "--no-verify", "--json")
    assert code == 0
    hall, attic = json.loads(said)["scenes"]
    assert "adapter" not in attic
    assert jobs.get(attic["job"]).config["adapter"] == hall["adapter"]
    kept = json.loads(Path(hall["adapter"], "scene.json").read_text())
    assert [image["name"] for image in kept["also"][0]["images"]] == [Path(file).name for file in PICTURES[1:]]
    assert len(kept["losses"]) == 6  # 6 pairs of either scene, two at a time, one epoch


def test_pairs_that_contradict_each_other_are_named_and_may_be_kept(tmp_path: Path, folders: list[Path]) -> None:
    other = folders[0] / "other.png"
    with Image.open(PICTURES[0]) as picture:
        picture.transpose(Image.Transpose.ROTATE_180).save(other)
    pictures = [*PICTURES[:2], str(other)]
    checked = reconstruct.run(config(images=pictures), tmp_path / "a", Silent())
    assert any("pairs are left out: their pictures differ in colour" in text for text in checked["warnings"])
    assert any("Only doubtful pairs connect" in text for text in checked["warnings"])
    as_told = reconstruct.run(config(images=pictures, verify=False), tmp_path / "b", Silent())
    assert as_told["warnings"] == []


def test_scenes_that_cannot_be_told_apart_or_are_empty(home: Path, folders: list[Path], capsys: Any) -> None:
    empty, twin = folders[0] / "empty", folders[1] / "hall"
    empty.mkdir()
    twin.mkdir()
    for given, message in (
        ([*folders, PICTURES[0]], "Give either the pictures of one scene or a folder per scene"),
        ([folders[0], twin], "Two folders are named 'hall'"),
        ([empty], "neither pictures nor a video in"),
        ([folders[0] / "nowhere"], "There is no picture"),
        ([folders[0], "--one-adapter", "--calibrate"], "the folders of two scenes or more"),
        ([*folders, "--one-adapter"], "--one-adapter needs --calibrate"),
        ([*folders, "--detach", "--out", "x.glb"], "--detach excludes --out"),
    ):
        code, _, said = ask(capsys, *given)
        assert code != 0
        assert message in " ".join(said.split()), said


@pytest.mark.journey
def test_a_picture_that_has_changed_since_calibration_is_a_warning(tmp_path: Path, folders: list[Path]) -> None:
    pictures = reconstruct.pictures_in(folders[0])
    done = reconstruct.run(config(images=pictures, calibrate=True, rank=2, mu=1.0), tmp_path / "a", Silent())
    same = reconstruct.run(config(images=pictures, adapter=done["adapter"]), tmp_path / "b", Silent())
    assert not any("picture(s) differ" in text for text in same["warnings"])
    shutil.copy(PICTURES[3], pictures[0])
    other = reconstruct.run(config(images=pictures, adapter=done["adapter"]), tmp_path / "c", Silent())
    assert any("1 picture(s) differ" in text and Path(pictures[0]).name in text for text in other["warnings"])
