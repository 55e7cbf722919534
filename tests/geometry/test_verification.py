"""Pairs are judged by the colours of the points that both pictures show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adapters.errors import InputError
from assets.build.dust3r import initialise
from pipelines.geometry import alignment, calibration, metrics
from pipelines.geometry.alignment import Alignment
from pipelines.geometry.calibration import Labels, Recipe
from pipelines.geometry.images import Affine, Photo
from pipelines.geometry.network import PointmapNetwork
from pipelines.geometry.verification import Verified, agreement, believed, correlation, verified
from tests.geometry.rooms import Room, overlap, room, spoil_narrow
from tests.geometry.test_calibration import SMALL


def photos(made: Room) -> list[Photo]:
    return [Photo(image, Affine(), f"{n}.png") for n, image in enumerate(made.views.image[0])]


def test_right_pointmaps_agree_and_turned_ones_do_not() -> None:
    clean = room(101, spread=150)
    shares, right = overlap(clean), agreement(clean.predictions, photos(clean))
    common = torch.tensor([shares[min(pair), max(pair)] > 0.2 for pair in clean.predictions.pairs])
    assert float(right[common].min()) > 0.7
    made = spoil_narrow(clean, 1)
    turned = ~made.good[1].float().mean(1).gt(0.5)
    assert float(agreement(made.predictions, photos(made))[turned].median()) < 0.5


def test_exposure_and_contrast_change_nothing() -> None:
    made = room(102, views=3)
    before = agreement(made.predictions, photos(made))
    changed = [replace(photo, pixels=photo.pixels * (0.3 + 0.2 * n) + 0.1 * n) for n, photo in enumerate(photos(made))]
    torch.testing.assert_close(agreement(made.predictions, changed), before, atol=1e-5, rtol=0)


def test_the_scale_of_a_pair_changes_nothing() -> None:
    made = room(103, views=3)
    p = made.predictions
    larger = replace(p, points1=p.points1 * 7, points2=p.points2 * 7)
    torch.testing.assert_close(agreement(larger, photos(made)), agreement(p, photos(made)), atol=1e-5, rtol=0)


def test_correlation_against_numpy() -> None:
    import numpy as np

    a, b = torch.rand(3, 50), torch.rand(3, 50)
    centred = [(x - x.mean(1, keepdim=True)).flatten().numpy() for x in (a, b)]
    assert correlation(a, b) == pytest.approx(float(np.corrcoef(*centred)[0, 1]), abs=1e-5)
    assert correlation(a, a) == pytest.approx(1)
    assert correlation(a, torch.full_like(a, 0.5)) == 0


def test_points_that_never_meet_say_nothing() -> None:
    made = room(104, views=3, size=12)
    away = replace(made.predictions, points2=made.predictions.points2 * torch.tensor([1.0, 1.0, -1.0]))
    assert agreement(away, photos(made)).tolist() == [0.0] * 6


def test_the_lower_order_counts_and_all_pictures_stay_connected() -> None:
    pairs = [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]
    assert believed(pairs, 3, torch.tensor([0.9, 0.9, 0.8, 0.7, 0.9, 0.1])) == [0, 1, 2, 3]
    # Nothing confirms picture 2: its better pair (with 0) is kept all the same, in both orders.
    assert believed(pairs, 3, torch.tensor([0.9, 0.9, 0.5, 0.4, 0.9, 0.1])) == [0, 1, 2, 3]
    assert believed(pairs, 3, torch.tensor([0.9, 0.9, 0.3, 0.4, 0.5, 0.6])) == [0, 1, 4, 5]


def test_a_picture_of_something_else_is_named() -> None:
    made, other = room(105, views=4, spread=30), room(106, views=4, spread=30)
    pictures = photos(made)
    pictures[3] = photos(other)[0]
    seen = verified(made.predictions, pictures)
    kept = seen.predictions.pairs
    assert sum(3 in pair for pair in kept) == 2
    assert all(pair in kept for pair in [(0, 1), (1, 2), (2, 0)])
    assert sorted(map(sorted, seen.groups)) == [[0, 1, 2], [3]]
    assert seen.within([(0, 1), (3, 0), (2, 3), (2, 0)]) == [(0, 1), (2, 0)]
    assert seen.warnings[0].startswith("4 of 12 pairs are left out: their pictures differ in colour")
    assert seen.warnings[1] == (
        "Only doubtful pairs connect these groups of pictures: 0 1 2 | 3. Take pictures in between."
    )
    assert verified(made.predictions, photos(made)).warnings == []


def test_sure_but_wrong_pairs_no_longer_bend_the_cameras() -> None:
    made = spoil_narrow(room(101, spread=150), 1)
    kept = verified(made.predictions, photos(made)).predictions
    plain, better = alignment.align(made.predictions, 150), alignment.align(kept, 150)
    assert metrics.trajectory_error(better.poses, made.poses) < 0.3 * metrics.trajectory_error(plain.poses, made.poses)


def test_a_shared_pixel_takes_the_largest_weight_of_its_picture() -> None:
    made = room(107, views=3, size=8)
    pairs = list(made.predictions.pairs)
    chosen = [pairs.index((0, 1)), pairs.index((1, 0)), pairs.index((1, 2)), pairs.index((2, 1))]
    scene = calibration.robust_alignment(made.predictions.select(chosen), steps=5, warmup=2)
    whole = calibration.shared(scene, [pairs[e] for e in chosen], pairs)
    assert whole.weights.shape == (2, 6, 64)
    best = torch.maximum(scene.weights[0, 0], scene.weights[1, 1])  # picture 0 comes first in (0, 1), second in (1, 0)
    for edge, pair in enumerate(pairs):
        for side in (0, 1):
            if pair[side] == 0:
                assert torch.equal(whole.weights[side, edge], best)


def calibrated_to_a_contradiction(**options: bool) -> tuple[Alignment, Labels]:
    """Three pictures of which the last is mirrored, so that it contradicts both others."""
    made = room(108, views=3, size=32, spread=30)
    pictures = photos(made)
    pictures[2] = replace(pictures[2], pixels=pictures[2].pixels.flip(-1))
    network = initialise(PointmapNetwork(SMALL), torch.Generator().manual_seed(0))
    _, scenes, labels, losses = calibration.calibrate(
        network, [pictures], [made.predictions], Recipe(rank=2, epochs=1), steps=10, warmup=5, cutoff=1e-6, mu=1.0,
        **options,
    )  # fmt: skip
    assert losses
    return scenes[0], labels[0]


def test_labels_stay_within_what_is_believed() -> None:
    scene, labels = calibrated_to_a_contradiction()
    assert scene.weights.shape[1] == 4  # a doubtful pair, in both orders, keeps the third picture in the scene
    assert sorted(labels.pairs) == [(0, 1), (1, 0)]
    assert any("doubtful" in text for text in labels.warnings)


def test_the_papers_way_aligns_and_labels_every_pair() -> None:
    scene, labels = calibrated_to_a_contradiction(verify=False, share=False)
    assert scene.weights.shape[1] == len(labels.pairs) == 6
    assert labels.warnings == []


def test_every_pair_of_a_group_is_labelled_also_those_that_were_not_aligned() -> None:
    made = room(109, views=3, size=12, spread=30)
    pairs = list(made.predictions.pairs)
    kept = made.predictions.select([e for e, pair in enumerate(pairs) if set(pair) != {0, 2}])
    scene = calibration.robust_alignment(kept, steps=60, warmup=20)
    labels = calibration.scene_labels(scene, Verified(kept, [[0, 1, 2]], []), pairs, cutoff=0.5)
    assert set(labels.pairs) == set(pairs)
    edge = labels.pairs.index((0, 2))
    move = metrics.onto_truth(scene.poses, made.poses)
    inverse = torch.linalg.inv(made.poses[0])
    truth = made.world()[2] @ inverse[:3, :3].T + inverse[:3, 3]
    valid = labels.valid[1, edge]
    assert float((labels.points(edge, 1) * move.scale - truth)[valid].norm(dim=-1).median()) < 0.05
    with pytest.raises(InputError, match="No two pictures agree in colour"):
        calibration.scene_labels(scene, Verified(kept, [[0], [1], [2]], []), pairs)
