"""The weight-space screen and Safe LoRA against dense algebra and the paper's own formula."""

from __future__ import annotations

import pytest
import torch

from adapters.formats.lora import LoraLayer
from adapters.inspection import alignment, safe_lora
from adapters.low_rank import truncated_svd


def _random(seed: int = 0, out: int = 20, width: int = 12, rank: int = 3):
    g = torch.Generator().manual_seed(seed)
    W, V = (torch.randn(out, width, generator=g, dtype=torch.float64) for _ in range(2))
    return W, V, torch.randn(out, rank, generator=g).double(), torch.randn(rank, width, generator=g).double()


def test_every_figure_equals_its_dense_form():
    W, V, L, R = _random()
    D = L @ R
    found = alignment.screen("m", W, L, R, W - V)
    values = torch.linalg.svdvals(D)
    U = alignment.subspace(V)
    C = V @ V.T / V.norm()
    wanted = {
        "relative": D.norm() / W.norm(), "spectral": values[0] / torch.linalg.svdvals(W)[0],
        "stable_rank": values.square().sum() / values[0] ** 2, "undo": -(V * D).sum() / V.square().sum(),
        "cosine": (V * D).sum() / V.norm() / D.norm(), "inside": (U.T @ D).square().sum() / D.square().sum(),
        "safe_lora": ((C @ D) * D).sum() / (C @ D).norm() / D.norm(),
    }  # fmt: skip
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(float(value), rel=1e-9), name
    held = torch.linalg.svdvals(V).square().cumsum(0) / V.square().sum()
    assert held[U.shape[1] - 1] >= alignment.KEPT_ENERGY
    assert U.shape[1] == 1 or held[U.shape[1] - 2] < alignment.KEPT_ENERGY


def test_one_whole_step_back_is_one_and_safe_lora_does_not_see_it():
    W, V, L, R = _random(1)
    V = L @ R  # of rank 3
    found = alignment.screen("m", W, -L, R, W - V)
    assert found.undo == pytest.approx(1.0)
    assert found.safe_lora is not None
    assert found.safe_lora > 0.8
    U = alignment.subspace(V, 1.0)
    torch.testing.assert_close(U @ (U.T @ -V), -V)


def test_an_update_of_zero_has_no_figures():
    W, V, L, R = _random(2)
    found = alignment.screen("m", W, 0 * L, R, W - V)
    assert (found.relative, found.undo, found.cosine, found.inside, found.safe_lora) == (0, 0, 0, 0, 0)


def test_projections_equal_the_paper_and_never_lengthen():
    _, V, L, R = _random(3)
    layer = LoraLayer(R.float(), L.float(), 6.0)
    U = alignment.subspace(V)
    P = U @ U.T
    torch.testing.assert_close(P @ P, P)
    exact = safe_lora.projected(layer, V, "exact")
    torch.testing.assert_close(exact.delta(), (P @ layer.delta().double()).float(), rtol=1e-4, atol=1e-5)
    assert exact.delta().norm() <= layer.delta().norm()
    # the paper's projection matrix, written as its program computes it
    C = torch.mm(V, V.t()) / torch.norm(V)
    paper = safe_lora.projected(layer, V, "safelora")
    torch.testing.assert_close(paper.B, (C @ layer.B.double()).float(), rtol=1e-5, atol=1e-5)
    assert safe_lora.mitigated(layer, V, tau=-1, undo_limit=9).layer is layer


def test_the_part_that_undoes_the_alignment_is_taken_out():
    _, V, L, R = _random(4)
    V = L @ R
    U, S, Vh = truncated_svd((-0.9 * V).float(), 3)
    layer = LoraLayer(Vh, U * S / 2, 6.0)  # scale 2
    made = safe_lora.mitigated(layer, V, undo_limit=0.05)
    assert made.undone
    assert made.undo == pytest.approx(0.9, abs=1e-5)
    assert made.layer.alpha == 6.0
    assert float(made.layer.delta().norm() / layer.delta().norm()) < 1e-4
    with_gain = LoraLayer(Vh, -U * S / 2, 6.0)  # along +V: nothing to take out
    assert not safe_lora.mitigated(with_gain, V).undone


def test_gaps_along_the_bases_direction():
    g = torch.Generator().manual_seed(5)
    harmful = torch.randn(40, 2, 8, generator=g) + torch.tensor([4.0] + [0.0] * 7)
    harmless = torch.randn(40, 2, 8, generator=g)
    same = alignment.gaps((harmful, harmless), (harmful, harmless))
    assert all(gap.ratio == pytest.approx(1.0) and gap.base_auc > 0.95 for gap in same)
    mixed = torch.cat([harmful, harmless])[torch.randperm(80, generator=g)]
    lost = alignment.gaps((harmful, harmless), (mixed[:40], mixed[40:]))
    assert all(abs(gap.ratio) < 0.5 and 0.2 < gap.adapter_auc < 0.8 for gap in lost)
    r = alignment.direction(harmful, harmless)[0]
    W, _, L, R = _random(6, out=8)
    dense = (r @ (L @ R)).norm() / (r @ W).norm()
    assert alignment.written_along(r, W, L, R) == pytest.approx(float(dense))
