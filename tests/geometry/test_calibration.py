"""LoRA3D: the weights' formula, robustness, labels, and the adapter's invariants."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from adapters.errors import Cancelled, InputError
from adapters.progress import Progress
from assets.build.dust3r import initialise
from pipelines.geometry import alignment, calibration, metrics
from pipelines.geometry.calibration import Recipe, calibrated, pseudo_labels, robust_alignment
from pipelines.geometry.images import Affine, Photo
from pipelines.geometry.inference import predict
from pipelines.geometry.network import NetworkConfig, PointmapNetwork
from pipelines.geometry.pairs import make_pairs
from tests.geometry.rooms import room, spoil_wide


@given(st.floats(0.5001, 5), st.floats(0, 3), st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_the_weight_is_the_minimum_of_the_joint_term(c: float, e: float, mu: float) -> None:
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda a: a * a * e + mu * (a - np.sqrt(c)) ** 2, bounds=(0, 3), method="bounded", options={"xatol": 1e-10}
    )
    made = calibrated(torch.tensor([c], dtype=torch.float64), torch.tensor([e], dtype=torch.float64), mu)
    assert float(made) == pytest.approx(float(found.x) ** 2, abs=1e-6)


def test_special_values_of_the_weight() -> None:
    c = torch.linspace(0.6, 4, 20, dtype=torch.float64)
    assert torch.equal(calibrated(c, torch.zeros_like(c), 0.03), c)
    torch.testing.assert_close(calibrated(c, torch.full_like(c, 0.03), 0.03), c / 4)
    far = calibrated(torch.full((9,), 2.0), torch.linspace(0, 1, 9), 0.03)
    assert bool((far.diff() < 0).all())
    assert calibrated(torch.tensor([0.49]), torch.zeros(1), 0.03).item() == 0


def test_new_weights_never_raise_the_joint_objective() -> None:
    generator = torch.Generator().manual_seed(0)
    c, e = torch.rand(1000, generator=generator) * 4 + 0.6, torch.rand(1000, generator=generator)

    def joint(w: torch.Tensor) -> torch.Tensor:
        return (w * e + 0.03 * (w.sqrt() - c.sqrt()) ** 2).sum()

    best = joint(calibrated(c, e, 0.03))
    for w in (c, torch.rand(1000, generator=generator) * 4, calibrated(c, e * 1.01, 0.03)):
        assert best <= joint(w) + 1e-4


def test_a_huge_mu_is_the_plain_alignment() -> None:
    p = room(0, views=4, size=12).predictions
    plain = alignment.align(p, 40)
    robust = robust_alignment(p, mu=1e9, warmup=10, steps=40)
    torch.testing.assert_close(robust.poses, plain.poses, atol=1e-5, rtol=0)
    np.testing.assert_allclose(robust.losses, plain.losses, rtol=1e-5)


def test_perfect_pointmaps_stay_perfect_and_their_labels_are_the_truth() -> None:
    made = room(1, views=4, size=16)
    scene = robust_alignment(made.predictions, steps=150, warmup=50)
    extent = float(made.world().norm(dim=-1).median())
    assert metrics.trajectory_error(scene.poses, made.poses) < 1e-3 * extent
    start = torch.stack([made.predictions.confidence1, made.predictions.confidence2]).log()
    # w = C / (1 + e / mu)^2: what is left of e after 150 steps of Adam is a few thousandths of mu
    assert float((scene.weights - start).abs().max()) < 0.1
    labels = pseudo_labels(scene, made.predictions.pairs, cutoff=0.5)
    assert len(labels.pairs) == 12
    move = metrics.onto_truth(scene.poses, made.poses)
    for edge, (i, j) in enumerate(labels.pairs):
        for n, points in ((i, labels.points(edge, 0)), (j, labels.points(edge, 1))):
            truth = made.world()[n] @ torch.linalg.inv(made.poses[i])[:3, :3].T + torch.linalg.inv(made.poses[i])[:3, 3]
            assert float((points * move.scale - truth).norm(dim=-1).median()) < 5e-3 * extent


def test_another_order_of_the_pictures_gives_the_same_scene() -> None:
    p = spoil_wide(room(7, views=4, size=12), 0).predictions
    order = [2, 0, 3, 1]  # picture n of the second scene is picture order[n] of the first
    place = {old: new for new, old in enumerate(order)}
    pairs = tuple((place[i], place[j]) for i, j in p.pairs)
    first, second = (robust_alignment(told, steps=60, warmup=20) for told in (p, replace(p, pairs=pairs)))
    torch.testing.assert_close(second.poses, first.poses[order], atol=1e-4, rtol=0)
    torch.testing.assert_close(second.focals, first.focals[order], atol=0, rtol=1e-4)
    torch.testing.assert_close(second.depth, first.depth[order], atol=1e-3, rtol=1e-3)
    kept = [pseudo_labels(scene, names, cutoff=0.1) for scene, names in ((first, p.pairs), (second, pairs))]
    assert [(order[i], order[j]) for i, j in kept[1].pairs] == list(kept[0].pairs)
    seen = [torch.stack([one.points(edge, 1) for edge in range(len(one.pairs))]) for one in kept]
    torch.testing.assert_close(seen[1], seen[0], atol=1e-3, rtol=1e-3)


def test_labels_of_an_image_agree_between_edges() -> None:
    p = room(2, views=3, size=12).predictions
    scene = robust_alignment(p, steps=30, warmup=10)
    labels = pseudo_labels(scene, p.pairs, cutoff=0.3)
    seen: dict[int, list[torch.Tensor]] = {}
    for edge, (i, j) in enumerate(labels.pairs):
        for n, points in ((i, labels.points(edge, 0)), (j, labels.points(edge, 1))):
            seen.setdefault(n, []).append(points @ scene.poses[i, :3, :3].T + scene.poses[i, :3, 3])
    for several in seen.values():
        for other in several[1:]:
            torch.testing.assert_close(other, several[0], atol=1e-5, rtol=1e-4)


def test_calibrated_confidence_finds_the_outliers_that_raw_confidence_hides() -> None:
    """Wide pairs turned by 6 to 20 degrees, 7 % of the pixels scattered, all of them as confident as the rest."""
    raw, found = [], []
    for seed in range(3):
        made = spoil_wide(room(10 + seed, views=5, size=12), seed)
        scene = robust_alignment(made.predictions, steps=200)
        raw.append(
            metrics.ranking(torch.stack([made.predictions.confidence1, made.predictions.confidence2]), made.good)
        )
        found.append(metrics.ranking(scene.weights, made.good))
    assert np.median(found) >= 0.7
    assert abs(np.median(raw) - 0.5) < 0.05


@cache
def core_rows() -> list[dict[str, Any]]:
    """The rooms of ``benchmarks/results/lora3d.md``, each aligned once."""
    from benchmarks import lora3d

    return [lora3d.core_once(seed, 300) for seed in range(8)]


def median(name: str) -> float:
    return float(np.median([row[name] for row in core_rows()]))


@pytest.mark.slow
def test_calibrated_confidence_finds_wrong_pairs_in_fresh_rooms() -> None:
    assert median("auc_w") >= 0.7
    assert median("auc_c") < 0.55


@pytest.mark.slow
@pytest.mark.xfail(
    reason="median ratios of 0.92 (cameras) and 0.94 (points) where 0.6 and 0.7 are asked: of eight fresh rooms the "
    "robust alignment is much better in one and alike in the others",
    strict=True,
)
@pytest.mark.parametrize(("measure", "most"), [("ate_ratio", 0.6), ("point_ratio", 0.7)])
def test_confident_outliers_bend_the_robust_alignment_less(measure: str, most: float) -> None:
    """In most rooms half of the pairs are wrong and all are equally sure: the spanning tree takes wrong ones, the start
    is far off, and neither alignment comes back from there within 300 steps."""
    assert median(measure) <= most


@pytest.mark.slow
@pytest.mark.xfail(
    reason="median ratios of 1.15 (cameras) and 2.09 (points) in fresh rooms where 0.6 and 0.7 are asked; in the rooms "
    "that were looked at while the check was made it was 0.14 and 0.34",
    strict=True,
)
@pytest.mark.parametrize(("measure", "most"), [("verified_ratio", 0.6), ("verified_point_ratio", 0.7)])
def test_with_contradicting_pairs_left_out_confident_outliers_bend_it_less(measure: str, most: float) -> None:
    """Much better in three rooms of eight (to a fiftieth), worse in four; why is not known."""
    assert median(measure) <= most


# ------------------------------------------------------------------------------------------------ the adapter

SMALL = NetworkConfig(img_size=(32, 32), patch_size=8, enc_embed_dim=48, enc_depth=2, enc_num_heads=4, dec_embed_dim=32,
                      dec_depth=2, dec_num_heads=2)  # fmt: skip


@pytest.fixture
def network() -> PointmapNetwork:
    return initialise(PointmapNetwork(SMALL), torch.Generator().manual_seed(0)).eval()


@pytest.fixture(scope="module")
def known() -> tuple[list[Photo], calibration.Labels]:
    made = room(3, views=3, size=32)
    photos = [Photo(image, Affine(), f"{n}.png") for n, image in enumerate(made.views.image[0])]
    scene = robust_alignment(made.predictions, steps=30, warmup=10)
    return photos, pseudo_labels(scene, made.predictions.pairs, cutoff=0.3)


def test_a_fresh_adapter_changes_nothing_and_training_leaves_the_base_alone(
    network: PointmapNetwork, known: tuple[list[Photo], calibration.Labels], tmp_path: Path
) -> None:
    photos, labels = known
    pairs = make_pairs(3)
    before = predict(network, photos, pairs)
    base = {key: value.clone() for key, value in network.state_dict().items()}
    fresh = predict(calibration.with_lora(copy.deepcopy(network), rank=4), photos, pairs)
    assert torch.equal(fresh.points1, before.points1)
    assert torch.equal(fresh.confidence2, before.confidence2)
    model, losses = calibration.train_adapter(network, [photos], [labels], Recipe(rank=4, epochs=6, lr=5e-3))
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    after = {key.replace("base_layer.", ""): value for key, value in model.base_model.model.state_dict().items()}
    assert all(torch.equal(after[key], value) for key, value in base.items())
    trained = predict(model, photos, pairs)
    folder = calibration.save_adapter(model, tmp_path / "scene", {"base": {"sha256": "abc", "name": "small"}})
    plain = PointmapNetwork(SMALL).eval()
    plain.load_state_dict(base)
    again, scene = calibration.load_adapter(plain, folder, "abc")
    assert scene["base"]["name"] == "small"
    assert torch.equal(predict(again, photos, pairs).points1, trained.points1)
    merged = again.merge_and_unload()
    torch.testing.assert_close(predict(merged, photos, pairs).points1, trained.points1, atol=1e-4, rtol=1e-4)
    other = PointmapNetwork(SMALL)
    with pytest.raises(InputError, match="another base"):
        calibration.load_adapter(other, folder, "def")


def test_the_same_seed_gives_the_same_adapter(known: tuple[list[Photo], calibration.Labels]) -> None:
    photos, labels = known
    made = []
    for _ in range(2):
        network = initialise(PointmapNetwork(SMALL), torch.Generator().manual_seed(0))
        model, _ = calibration.train_adapter(
            network, [photos, photos], [labels, labels], Recipe(rank=2, epochs=1, seed=7)
        )  # fmt: skip
        made.append({k: v for k, v in model.state_dict().items() if "lora" in k})
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


def test_the_paper_preset_on_the_real_sizes() -> None:
    with torch.device("meta"):
        model = calibration.with_lora(PointmapNetwork(NetworkConfig()), rank=16)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4_521_984
    with torch.device("meta"):
        wider = calibration.with_lora(PointmapNetwork(NetworkConfig()), rank=16, preset="all-attention")
    assert sum(p.numel() for p in wider.parameters() if p.requires_grad) * 4 / 1e6 == pytest.approx(25.95, abs=0.01)


class _StopAt:
    def __init__(self, stage: str) -> None:
        self.stage, self.met = stage, False

    def report(self, progress: Progress) -> None:
        self.met = self.met or (progress.stage == self.stage and progress.step > 0)

    def cancelled(self) -> bool:
        return self.met


def test_training_can_be_stopped(network: PointmapNetwork, known: tuple[list[Photo], calibration.Labels]) -> None:
    photos, labels = known
    with pytest.raises(Cancelled):
        calibration.train_adapter(network, [photos], [labels], Recipe(rank=2), _StopAt("calibrate"))


def test_nothing_half_written_is_left(network: PointmapNetwork, tmp_path: Path, monkeypatch: Any) -> None:
    model = calibration.with_lora(network, 2)
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibration.save_adapter(model, tmp_path / "scene", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda n, s, p: calibration.reweighting(0), "mu must be"),
        (lambda n, s, p: pseudo_labels(s, p, cutoff=-1), "cutoff"),
        (lambda n, s, p: calibration.with_lora(n, rank=0), "between 1 and 32"),
        (lambda n, s, p: calibration.with_lora(n, rank=33), "between 1 and 32"),
        (lambda n, s, p: Recipe(epochs=0), "at least 1"),
        (lambda n, s, p: Recipe(preset="mlp"), "Unknown preset"),
        (lambda n, s, p: calibration.load_adapter(n, Path("nowhere")), "contains no PEFT adapter"),
    ],
)
def test_bad_settings_are_sentences(network: PointmapNetwork, what: Any, message: str) -> None:
    p = room(4, views=3, size=8).predictions
    scene = robust_alignment(p, steps=2, warmup=1)
    with pytest.raises(InputError, match=message):
        what(network, scene, p.pairs)


def test_identical_cameras_cannot_calibrate() -> None:
    p = room(5, views=3, size=8).predictions
    scene = robust_alignment(p, steps=2, warmup=1)
    scene.poses = scene.poses[:1].repeat(3, 1, 1)
    with pytest.raises(InputError, match="same place"):
        pseudo_labels(scene, p.pairs)


def test_no_pair_that_keeps_enough_pixels() -> None:
    p = room(5, views=3, size=8).predictions
    scene = robust_alignment(p, steps=2, warmup=1)
    scene.weights.zero_()
    with pytest.raises(InputError, match=r"No pair of images keeps enough pixels at the cutoff 1\.5"):
        pseudo_labels(scene, p.pairs)


def test_training_stops_at_a_loss_that_is_not_finite(
    network: PointmapNetwork, known: tuple[list[Photo], calibration.Labels]
) -> None:
    photos, labels = known
    broken = replace(labels, world=labels.world * torch.inf)
    with pytest.raises(InputError, match="loss of step 0 is not finite"):
        calibration.train_adapter(network, [photos], [broken], Recipe(rank=2, epochs=1))


def test_adapters_are_peft_s_own_and_those_that_peft_wrote_still_load(
    network: PointmapNetwork, known: tuple[list[Photo], calibration.Labels], tmp_path: Path
) -> None:
    photos, labels = known
    base = copy.deepcopy(network)
    model, _ = calibration.train_adapter(network, [photos], [labels], Recipe(rank=4, epochs=1))
    trained = predict(model, photos, make_pairs(3)).points2
    written = calibration.save_adapter(model, tmp_path / "written", {})
    before = tmp_path / "before"  # as earlier versions wrote them
    model.save_pretrained(before)
    (before / "scene.json").write_text('{"images": [], "settings": {}}')
    loaded = [calibration.load_adapter(copy.deepcopy(base), folder)[0] for folder in (written, before)]
    for again in (PeftModel.from_pretrained(copy.deepcopy(base), written), *loaded):
        assert torch.equal(predict(again, photos, make_pairs(3)).points2, trained)


def test_an_adapter_of_other_shapes_and_a_damaged_scene_file(network: PointmapNetwork, tmp_path: Path) -> None:
    folder = calibration.save_adapter(calibration.with_lora(network, 2), tmp_path / "scene", {})
    wider = PointmapNetwork(replace(SMALL, enc_embed_dim=64))
    with pytest.raises(InputError, match="does not fit this base"):
        calibration.load_adapter(wider, folder)
    (folder / "scene.json").write_text("{")
    with pytest.raises(InputError, match=r"scene\.json' is damaged"):
        calibration.load_adapter(network, folder)


def test_a_cutoff_that_keeps_too_little_is_lowered_with_a_warning() -> None:
    p = room(6, views=3, size=8, confidence=3.0).predictions
    scene = robust_alignment(p, steps=5, warmup=3)
    labels = pseudo_labels(scene, p.pairs, cutoff=50.0)
    assert labels.warnings
    assert labels.cutoff < 50
    kept = float(torch.cat([(scene.weights > labels.cutoff).flatten()]).double().mean())
    assert kept == pytest.approx(0.5, abs=0.02)
