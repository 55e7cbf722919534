"""The viewer's file and the flight: the scene fills the frame, whatever its place, size and direction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from scipy.spatial.transform import Rotation

from pipelines.geometry import alignment, previews
from pipelines.geometry.images import Affine, Photo
from pipelines.geometry.previews import VIEW_ABOVE, VIEW_DISTANCE
from pipelines.geometry.scene import Array, Scene
from pipelines.geometry.selection import Selection
from tests.geometry.rooms import room


@pytest.fixture(scope="module")
def scene() -> Scene:
    made = room(5, views=4, size=24)
    found = alignment.align(made.predictions, 20)
    return Scene.of(found, [Photo(x, Affine(), f"{n}.png") for n, x in enumerate(made.views.image[0])])


def elsewhere(scene: Scene) -> Scene:
    """The same scene, turned, 40 times as large and far away."""
    poses = scene.poses.copy()
    turn = Rotation.from_euler("xyz", [50, -70, 20], degrees=True).as_matrix()
    poses[:, :3, :3] = turn @ poses[:, :3, :3]
    poses[:, :3, 3] = 40 * poses[:, :3, 3] @ turn.T + [900, -300, 70]
    return replace(scene, poses=poses, depth=tuple(40 * depth for depth in scene.depth))


def seen(points: Array) -> Array:
    """Places in the frame, -1 to 1, from where the page looks at the viewer's file."""
    b = np.radians(VIEW_ABOVE)
    above = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    own = points @ above.T - [0, 0, VIEW_DISTANCE]
    return own[:, :2] / -own[:, 2:] / previews.HALF_FRAME


@pytest.mark.parametrize("mesh", [True, False])
def test_the_scene_fills_the_viewer_wherever_it_lies(scene: Scene, mesh: bool, tmp_path: Path) -> None:
    places = []
    for n, one in enumerate((scene, elsewhere(scene))):
        made = previews.write_view(one, tmp_path / f"{n}.glb", mesh=mesh)
        loaded = trimesh.load(tmp_path / f"{n}.glb")
        np.testing.assert_allclose(loaded.bounds.sum(0), 0, atol=0.05)  # viewers look at the middle of all
        assert len(loaded.geometry) == 1 + 2 * 4  # the scene, and per camera its bars and its photo
        places.append(seen(np.asarray(loaded.geometry["scene"].vertices)))
        inside = (np.abs(places[-1]) <= 1.001).all(1)
        assert 0.7 < inside.mean() < 0.95
        assert np.ptp(places[-1][inside], axis=0).max() > 1.6
        assert made.points > 0
    np.testing.assert_allclose(places[0], places[1], atol=2e-3)


def test_the_flight_shows_the_scene_from_both_sides(scene: Scene, tmp_path: Path) -> None:
    file = previews.write_flight(scene, tmp_path / "a.gif", Selection())
    with Image.open(file) as gif:
        assert gif.n_frames == 2 * previews.VIEWPOINTS - 2
        frames = []
        for n in range(previews.VIEWPOINTS):
            gif.seek(n)
            frames.append(np.asarray(gif.convert("RGB")).astype(int))
    for frame in frames:
        filled = (np.abs(frame - previews.BACKGROUND).max(-1) > 12).mean()
        assert filled > 1 / 3
    assert np.abs(frames[0] - frames[-1]).mean() > 5


def test_what_is_near_hides_what_is_far_and_what_is_behind_is_left_out() -> None:
    points = np.array([[0, 0, -2.0], [0, 0, -1.0], [0, 0, 1.0]])
    picture = previews.drawn(points, np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8), 20, 20)
    colours = {tuple(c) for c in picture.reshape(-1, 3).tolist()}
    assert colours == {(0, 255, 0), (previews.BACKGROUND,) * 3}
