"""Cameras, pairs, pictures, alignment, measures and exports, against algebra and other programs' conventions."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adapters.errors import InputError
from pipelines.geometry import alignment, cameras, images, metrics, video
from pipelines.geometry.images import Affine
from pipelines.geometry.inference import Predictions
from pipelines.geometry.pairs import components, keep_near, make_pairs
from tests.geometry.rooms import room


def rotations(count: int, seed: int = 0) -> torch.Tensor:
    from scipy.spatial.transform import Rotation

    return torch.from_numpy(Rotation.random(count, rng=seed).as_matrix())


def test_quaternions_agree_with_scipy() -> None:
    from scipy.spatial.transform import Rotation

    turn = rotations(50)
    q = cameras.matrix_quaternion(turn)
    torch.testing.assert_close(torch.from_numpy(Rotation.from_quat(q.numpy()).as_matrix()), turn)
    torch.testing.assert_close(cameras.quaternion_matrix(q), turn)
    angle = Rotation.from_matrix((turn[:25].mT @ turn[25:]).numpy()).magnitude()
    torch.testing.assert_close(cameras.rotation_angle(turn[:25], turn[25:]), torch.from_numpy(np.degrees(angle)))


def test_umeyama_finds_the_similarity_and_ignores_weightless_points() -> None:
    source = torch.randn(4, 30, 3, dtype=torch.float64)
    move = cameras.Similarity(torch.tensor([0.3, 1, 2, 5.0]).double(), rotations(4), torch.randn(4, 3).double())
    target, weight = move(source), torch.ones(4, 30)
    target[:, :5] += 100
    weight[:, :5] = 0
    found = cameras.umeyama(source, target, weight)
    for a, b in ((found.scale, move.scale), (found.rotation, move.rotation), (found.shift, move.shift)):
        torch.testing.assert_close(a, b)


def test_the_nearest_similarity_follows_the_majority_where_least_squares_shrink() -> None:
    """One point in ten is far off: the scale errs by more than a tenth in least squares, here by three per cent."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    move = cameras.Similarity(torch.tensor(2.0).double(), rotations(1)[0], torch.ones(3).double())
    target = move(source)
    source[::10] += 3 * torch.randn(40, 3, generator=generator, dtype=torch.float64)
    assert float(cameras.umeyama(source, target).scale) < 1.8
    found = cameras.nearest_similarity(source, target)
    assert float(found.scale) == pytest.approx(2, rel=0.03)
    assert float(cameras.rotation_angle(found.rotation, move.rotation)) < 1
    weight = torch.ones(400)
    weight[::10] = 0
    assert float(cameras.nearest_similarity(source, target, weight).scale) == pytest.approx(2, rel=1e-6)


def test_focal_and_pose_come_back_from_exact_pointmaps() -> None:
    made = room(0, views=2, size=32)
    points, _ = made.predictions.map1(0)
    true = float(made.focals[0])
    assert cameras.focal_length(points) == pytest.approx(true, rel=1e-4)
    spoilt = points.clone()
    spoilt[:8] *= torch.tensor([1.5, 1.5, 1.0])  # a quarter of the rows: the mean would follow, Weiszfeld hardly does
    assert cameras.focal_length(spoilt) == pytest.approx(true, rel=0.1)
    generator = torch.Generator().manual_seed(0)
    wild = points.clone()
    hit = torch.rand(32, 32, generator=generator) < 0.3
    wild[hit] = torch.randn(int(hit.sum()), 3, generator=generator) * torch.tensor([3.0, 3.0, 0.1])  # z near 0, or less
    assert cameras.focal_length(wild) == pytest.approx(true, rel=0.01)
    assert cameras.focal_length(-points) == pytest.approx(16 / np.tan(np.pi / 6))  # nothing lies before the camera
    world = made.world()[1].unflatten(0, (32, 32))
    everything = torch.ones(32, 32, dtype=torch.bool)
    pose, _ = cameras.solve_pnp(world, everything, true) or (None, 0)
    assert pose is not None
    torch.testing.assert_close(pose, made.poses[1], atol=1e-3, rtol=0)
    found = cameras.solve_pnp(world, everything, None)
    assert found is not None
    # Five pixels of tolerance are a sixth of this small picture: the search can only be coarse.
    assert found[1] == pytest.approx(true, rel=0.35)
    assert cameras.solve_pnp(world, torch.zeros_like(everything), true) is None


def test_two_pictures_need_no_optimisation() -> None:
    made = room(1, views=2, size=32)
    scene = alignment.view_pair(made.predictions)
    torch.testing.assert_close(scene.focals, made.focals, rtol=1e-3, atol=0)
    relative = torch.linalg.inv(made.poses[0]) @ made.poses[1]
    found = torch.linalg.inv(scene.poses[0]) @ scene.poses[1]
    assert float(cameras.rotation_angle(relative[:3, :3], found[:3, :3])) < 0.5


def test_known_cameras_stay_and_the_points_come_out_in_their_scale() -> None:
    made = room(2, views=4, size=16)
    scene = alignment.align(made.predictions, 60, poses=made.poses, focals=made.focals)
    torch.testing.assert_close(scene.poses, made.poses, atol=1e-5, rtol=0)
    error = (scene.points(2).flatten(0, 1) - made.world()[2]).norm(dim=-1).median()
    assert float(error) < 0.02 * float(made.world()[2].norm(dim=-1).median())


def test_pictures_of_different_sizes_and_falling_apart() -> None:
    p = room(3, views=4, size=8).predictions
    with pytest.raises(InputError, match="three or more"):
        alignment.align(room(3, views=2, size=8).predictions)
    apart = [e for e, pair in enumerate(p.pairs) if set(pair) in ({0, 1}, {2, 3})]
    parts = Predictions(
        p.sizes,
        tuple(p.pairs[e] for e in apart),
        *(x[apart] for x in (p.points1, p.points2, p.confidence1, p.confidence2)),
    )
    with pytest.raises(InputError, match="2 groups"):
        alignment.align(parts)


@given(st.integers(1, 12), st.sampled_from(["complete", "swin", "swin-1", "swin-noncyclic", "logwin", "oneref-0"]))
@settings(max_examples=50, deadline=None)
def test_graphs_are_symmetric_connected_and_without_repeats(count: int, graph: str) -> None:
    pairs = make_pairs(count, graph)
    assert len(set(pairs)) == len(pairs)
    assert {(j, i) for i, j in pairs} == set(pairs)
    assert len(components(count, pairs)) == 1
    assert pairs == make_pairs(count, graph)
    if graph == "complete" and count > 1:
        assert len(pairs) == count * (count - 1)


@given(st.text(max_size=20))
@settings(max_examples=80, deadline=None)
def test_any_graph_text_is_understood_or_refused(text: str) -> None:
    try:
        make_pairs(5, text)
    except InputError:
        return


def test_graph_limits() -> None:
    with pytest.raises(InputError, match="992 ordered pairs"):
        make_pairs(32)
    assert len(make_pairs(32, many=True)) == 992
    with pytest.raises(InputError, match="no images"):
        make_pairs(0)
    for graph, most in (("swin-5", "swin-4"), ("logwin-4-noncyclic", "logwin-3"), ("oneref-5", "numbered from 0")):
        with pytest.raises(InputError, match=most):
            make_pairs(5, graph)
    assert make_pairs(2, "swin") == [(0, 1), (1, 0)]  # the usual window shrinks with the pictures
    assert keep_near([(0, 9), (0, 1)], 1) == [(0, 1)]
    assert keep_near([(0, 9), (0, 1)], 1, 10) == [(0, 9), (0, 1)]


@pytest.mark.parametrize(
    ("size", "given_size", "wanted"),
    [(512, (1024, 768), (384, 512)), (512, (768, 1024), (512, 384)), (512, (900, 900), (384, 512)),
     (224, (640, 480), (224, 224)), (64, (64, 64), (64, 64))],
)  # fmt: skip
def test_pictures_are_cut_as_the_networks_were_trained(size: int, given_size: tuple[int, int], wanted: object) -> None:
    photo = images.prepare(
        Image.new("RGB", given_size), "x", size=size, patch=8 if size == 64 else 16, square_ok=size == 64
    )
    assert photo.size == wanted


def test_intrinsics_go_back_to_the_file() -> None:
    """A point at the middle of the file is seen at its middle, and the focal grows with the picture."""
    affine = Affine((0.5, 0.5), (16, 0), (1056, 768))
    fx, fy, cx, cy = affine.intrinsics(300.0, 384, 496)
    assert (fx, fy) == (600, 600)
    assert cx == pytest.approx((248 + 16 + 0.5) / 0.5 - 0.5)
    assert cy == pytest.approx((192 + 0.5) / 0.5 - 0.5)


def test_unreadable_pictures_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        images.read_photo(tmp_path / "x.png")
    with pytest.raises(InputError, match="no frames"):
        video.read_video(tmp_path / "x.png", 1.0)
    with pytest.raises(InputError, match="too narrow"):
        images.prepare(Image.new("RGB", (2000, 10)), "x")


def test_measures() -> None:
    made = room(4, views=5, size=8)
    move = cameras.Similarity(torch.tensor(3.0), rotations(1)[0].float(), torch.tensor([1.0, 2, 3]))
    moved = move.pose(made.poses)
    assert metrics.trajectory_error(moved, made.poses) < 1e-5
    assert metrics.relative_pose_error(moved, made.poses)[0] < 1e-5
    assert metrics.pose_accuracy(moved, made.poses) == {"rra": 1, "rta": 1, "maa": 1}
    with pytest.raises(InputError, match="three or more"):
        metrics.trajectory_error(made.poses[:2], made.poses[:2])
    x = made.world()[0].unflatten(0, (8, 8))
    assert metrics.pair_error((x / 7, x / 7), (x, x)) < 1e-5
    assert metrics.cloud_distances(x.flatten(0, 1), x.flatten(0, 1) + 1e-9)["chamfer"] < 1e-6
    assert metrics.depth_errors((x[..., 2] + 9) * 5, x[..., 2] + 9).abs_rel < 1e-6
    score = torch.arange(10.0)
    assert metrics.ranking(score, score > 6) == 1
    quality = metrics.confidence_quality(score, -score + 10)
    assert quality["spearman"] == pytest.approx(1)
    assert quality["ause"] == pytest.approx(0, abs=1e-9)


def test_a_broken_alignment_names_its_pair() -> None:
    p = room(3, views=3, size=8).predictions
    p.confidence2[4, 7] = torch.inf
    with pytest.raises(
        InputError, match=re.escape(f"not finite after 0 steps, first in the pair of pictures {p.pairs[4]}")
    ):
        alignment.align(p, 3)
