"""The facade: photos in, a scene out, an adapter if asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh

import assets
from adapters.errors import InputError
from pipelines.geometry import Scene, ScenePipeline
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
    assert scene.export(tmp_path / "room.ply") == len(trimesh.load(tmp_path / "room.ply").vertices)
    assert scene.export(tmp_path / "room.glb") > 0
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
    with pytest.raises(InputError, match="come under X"):
        ScenePipeline.from_pretrained(tmp_path)
