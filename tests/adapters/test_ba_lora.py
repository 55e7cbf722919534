"""BA-LoRA's terms: bounds, zeros, torch's KL, schedule."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from adapters.errors import InputError
from adapters.learn import ba_lora
from adapters.learn.ba_lora import PAPER, consistency, diversity_covariance, diversity_topk, spectral, weights_at


def logits(rows: int = 12, columns: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_consistency_is_scaled_kl(monkeypatch):
    zf, zp = logits(seed=1).requires_grad_(), logits(seed=2)
    wanted = 9 * F.kl_div(F.log_softmax(zf / 3, -1), F.softmax(zp / 3, -1), reduction="batchmean")
    torch.testing.assert_close(consistency(zf, zp, 3.0), wanted)
    monkeypatch.setattr(ba_lora, "CHUNK", 5)
    torch.testing.assert_close(consistency(zf, zp, 3.0), wanted)
    assert consistency(zf, zp) >= 0
    same = consistency(zf, zf.detach())
    same.backward()
    assert abs(same.item()) < 1e-12
    assert zf.grad.abs().max() < 1e-12
    with pytest.raises(InputError, match="7 logits, the base 6"):
        consistency(zf, zp[:, :6])


def test_covariance_term_is_zero_for_uncorrelated_logits():
    basis = torch.linalg.qr(torch.cat([torch.ones(8, 1), logits(8, 4)], dim=1))[0][:, 1:]  # centred, orthogonal
    assert float(diversity_covariance(basis * torch.tensor([1.0, 2, 3, 4]))) < 1e-20
    z = logits()
    C = torch.cov(z.T)
    torch.testing.assert_close(diversity_covariance(z), (C.square().sum() - C.diagonal().square().sum()) / 7)
    with pytest.raises(InputError, match="at least 2"):
        diversity_covariance(z[:1])


def test_entropy_term_is_bounded():
    assert -math.log(5) <= float(diversity_topk(logits(), 5)) <= 0
    assert float(diversity_topk(torch.zeros(3, 9), 5)) == pytest.approx(-math.log(5))
    assert float(diversity_topk(1000 * torch.eye(9)[:3], 5)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["nuclear", "frobenius"])
def test_spectral_term_and_its_gradient(kind):
    z = logits().requires_grad_()
    S = torch.linalg.svdvals(z)
    wanted = -S[:3].sum() / (S.sum() if kind == "nuclear" else S.norm())
    found = spectral(z, 3, kind)
    torch.testing.assert_close(found, wanted)
    ours, theirs = torch.autograd.grad(found, z)[0], torch.autograd.grad(wanted, z)[0]
    torch.testing.assert_close(ours, theirs)
    if kind == "nuclear":
        assert -1 <= float(found) <= -3 / 7
        low = logits(12, 2) @ logits(2, 7)
        assert float(spectral(low, 2, kind)) == pytest.approx(-1)
    assert float(spectral(z[:1], 3, kind)) == 0
    assert float(spectral(0 * z, 3, kind)) == 0


def test_spectral_of_wide_logits_is_near_the_exact_one(monkeypatch):
    U, V = torch.linalg.qr(logits(80, 60))[0], torch.linalg.qr(logits(90, 60, 1))[0]
    z = (U * 0.9 ** torch.arange(60)) @ V.T
    exact = spectral(z, 5)
    monkeypatch.setattr(ba_lora, "EXACT", 10)
    state = torch.get_rng_state()
    assert float(spectral(z, 5, seed=3)) == pytest.approx(float(exact), rel=0.01)
    assert torch.equal(state, torch.get_rng_state())


def test_schedule_of_the_paper():
    at = {t: weights_at(PAPER["nlg"], round(10 * t), 1000) for t in (0, 20, 22.5, 25, 100)}
    assert at[0].l1 == 0.025
    assert at[100].l1 == pytest.approx(0.0025)
    assert [round(at[t].l2 / 0.005, 6) for t in (0, 20, 22.5, 25, 100)] == [0, 0, 0.5, 1, 1]
    assert at[22.5].l3 == at[22.5].l2
    assert weights_at(PAPER["nlu"], 5, 0, "constant") == PAPER["nlu"]
    with pytest.raises(InputError, match="max_steps"):
        weights_at(PAPER["nlu"], 0, 0)


def test_rows_of_valid_labels():
    labels = torch.tensor([[-100, 3, 4, -100], [-100, -100, -100, -100]])
    assert ba_lora.valid_rows(labels).tolist() == [[True, True, False, False], [False] * 4]
    assert ba_lora.valid_rows(labels, shifted=False).tolist() == [[False, True, True, False], [False] * 4]


def test_first_code():
    zf, zp = logits(6, 5).reshape(2, 3, 5), logits(6, 5, 1).reshape(2, 3, 5)
    kl = F.kl_div(F.log_softmax(zf.float(), -1), F.softmax(zp.float(), -1), reduction="sum") / 2
    torch.testing.assert_close(ba_lora.consistency_2024(zf, zp, "nlg"), kl)
    cosine = F.cosine_similarity(zf[0].float(), zp[0].float())
    torch.testing.assert_close(ba_lora.consistency_2024(zf[0], zp[0], "nlu"), (2 - 2 * cosine).mean() / 5)
    assert float(ba_lora.diversity_2024(torch.zeros(2, 3, 5), "nlg")) == pytest.approx(-math.log(5))
