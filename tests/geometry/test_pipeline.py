"""The facade: photos in, a scene out, an adapter if asked."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import trimesh
from PIL import Image

import assets
from adapters.errors import InputError
from pipelines.geometry import Scene, ScenePipeline, video
from pipelines.geometry.calibration import Recipe
from pipelines.geometry.pipeline import Calibration

PHOTOS = sorted(assets.path("scenes/room").glob("*.png"))[::2]


@pytest.fixture(scope="module")
def pipeline() -> ScenePipeline:
    return ScenePipeline.from_pretrained(assets.path("models/dust3r-tiny"))


def test_a_scene_from_photos_is_exported_by_the_ending_of_its_file(pipeline: ScenePipeline, tmp_path: Path) -> None:
    scene = pipeline(PHOTOS, steps=5)
    assert scene.names == tuple(file.name for file in PHOTOS)
    assert (scene.record.pairs, scene.record.encodings, scene.record.calibration) == (12, 4, None)
    assert scene.export(tmp_path / "room.ply").points == len(trimesh.load(tmp_path / "room.ply").vertices)
    assert scene.export(tmp_path / "room.glb").points > 0
    scene.export(tmp_path / "room.npz")
    np.testing.assert_array_equal(Scene.load(tmp_path / "room.npz").poses, scene.poses)
    with pytest.raises(InputError, match="Unknown export 'obj'"):
        scene.export(tmp_path / "room.obj")


def test_photos_read_before_give_the_same_scene(pipeline: ScenePipeline) -> None:
    read = pipeline.read(PHOTOS[:3])
    np.testing.assert_array_equal(pipeline(read, steps=3).poses, pipeline(PHOTOS[:3], steps=3).poses)


def test_calibrating_gives_an_adapter_that_makes_the_same_scene_again(pipeline: ScenePipeline, tmp_path: Path) -> None:
    own = ScenePipeline.from_pretrained(assets.path("models/dust3r-tiny"))
    plain = pipeline(PHOTOS, steps=5)
    told: list[Calibration] = []
    scene = own(PHOTOS, Recipe(rank=2, epochs=1), steps=5, on_calibrated=told.append)
    (learnt,) = told
    assert scene.record.calibration is learnt
    np.testing.assert_array_equal(learnt.before.poses, plain.poses)
    assert not np.array_equal(scene.poses, plain.poses)
    folder = learnt.save(tmp_path / "adapter")
    again = ScenePipeline.from_pretrained(assets.path("models/dust3r-tiny"), folder)
    np.testing.assert_array_equal(again(PHOTOS, steps=5).poses, scene.poses)
    with pytest.raises(InputError, match="not both"):
        again(PHOTOS, calibrate=True)


def test_a_licence_that_must_be_accepted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not for commercial use"):
        ScenePipeline.from_pretrained("naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt")
    (tmp_path / "config.json").write_text('{"licence": "X, not for commercial use"}')
    with pytest.raises(InputError, match="licensed under X"):
        ScenePipeline.from_pretrained(tmp_path)


def test_pictures_of_16_bits_give_the_scene_of_their_8_bits(pipeline: ScenePipeline, tmp_path: Path) -> None:
    scenes = []
    for kind, top in ((np.uint8, 1), (np.uint16, 257)):
        files = [tmp_path / f"{top}-{n}.png" for n in range(3)]
        for file, photo in zip(files, PHOTOS, strict=False):
            Image.fromarray(np.asarray(Image.open(photo).convert("L")).astype(kind) * kind(top)).save(file)
        scenes.append(pipeline(files, steps=3))
    np.testing.assert_array_equal(scenes[0].images, scenes[1].images)
    np.testing.assert_array_equal(scenes[0].focals, scenes[1].focals)


# ------------------------------------------------------------------------------------------------ videos


def film(file: Path, frames: list[np.ndarray], rate: float = 2) -> Path:
    """A video of grey levels."""
    height, width = frames[0].shape[:2]
    stream = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"mp4v"), rate, (width, height))
    for frame in frames:
        stream.write(frame)
    stream.release()
    return file


def test_frames_come_from_the_whole_video(tmp_path: Path) -> None:
    file = film(tmp_path / "walk.mp4", [np.full((48, 64, 3), 20 + n, np.uint8) for n in range(200)])
    taken = video.read_video(file, 1.0, most=20)
    shades = [float(np.asarray(frame).mean()) for frame in taken.images]
    assert len(shades) == 20
    assert shades[0] < 23
    assert shades[-1] > 215
    steps = np.diff(shades)
    assert steps.min() > 0.6 * steps.mean()
    assert steps.max() < 1.4 * steps.mean()
    assert taken.times == pytest.approx(np.linspace(0, 99.5, 20), abs=0.6)
    assert "20 frames of the video's 100.0 seconds" in str(taken)
    assert len(video.read_video(film(tmp_path / "short.mp4", [np.zeros((48, 64, 3), np.uint8)] * 7), 1.0).images) == 4


def test_the_sharpest_frame_near_a_place_is_taken(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sharp = cv2.resize(random.integers(0, 255, (24, 32, 3), np.uint8), (64, 48), interpolation=cv2.INTER_NEAREST)
    frames = [cv2.blur(sharp, (9, 9))] * 40
    for n in (1, 11, 22, 31):  # a place is every tenth frame
        frames[n] = sharp
    taken = video.read_video(film(tmp_path / "walk.mp4", frames, 10), 1.0)
    assert [round(time * 10) for time in taken.times] == [1, 11, 22, 31]


def test_a_scene_of_a_video_says_what_was_taken_and_keeps_the_frames(pipeline: ScenePipeline, tmp_path: Path) -> None:
    pictures = [np.asarray(Image.open(photo).convert("RGB").resize((160, 160)))[..., ::-1] for photo in PHOTOS]
    file = film(tmp_path / "walk.mp4", [picture for picture in pictures for _ in range(2)])
    scene = pipeline(file, steps=3, frames=tmp_path / "frames")
    assert scene.names == tuple(f"frame-{n:04}.png" for n in range(4))
    assert scene.record.warnings[0].startswith("Taken: 4 frames of the video's 4.0 seconds")
    scene.export(tmp_path / "out", "colmap")
    assert {Image.open(picture).size for picture in (tmp_path / "out/images").iterdir()} == {(160, 160)}
