"""NP-LoRA and LoraHub: against whole matrices, and the limits in which they are something simpler."""

from __future__ import annotations

import math

import pytest
import torch

from adapters.errors import InputError
from adapters.formats.lora import LoraFile, LoraLayer
from adapters.merging.concatenate import concatenate
from adapters.merging.lorahub import merged, search
from adapters.merging.np_lora import np_lora, principal_inputs


def layer(seed: int, rank: int = 3, shape: tuple[int, ...] = (9, 7)) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
    return LoraLayer(torch.randn(rank, *shape[1:], generator=generator), B, 2.0)


def file(seed: int, rank: int = 3) -> LoraFile:
    return LoraFile({"unet": {"a": layer(seed, rank), "conv": layer(seed + 50, rank, (5, 4, 3, 3))}})


def deltas(made: LoraFile) -> dict[str, torch.Tensor]:
    return {module: one.delta().flatten(1) for _, module, one in made.layers()}


# NP-LoRA


@pytest.mark.parametrize("directions", [None, 1, 2])
@pytest.mark.parametrize("mu", [0.5, 3.0, math.inf])
def test_np_lora_is_the_projection_of_the_whole_matrix(directions: int | None, mu: float) -> None:
    concept, style = file(0), file(1, rank=2)
    found = deltas(np_lora([concept, style], [0.7, 0.9], directions=directions, mu=mu).file)
    C, S = deltas(concept), deltas(style)
    for name, value in found.items():
        V = torch.linalg.svd(S[name]).Vh[: directions or 2].T
        part = 1.0 if math.isinf(mu) else mu / (1 + mu)
        expected = 0.9 * S[name] + 0.7 * (C[name] - part * C[name] @ V @ V.T)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_np_lora_leaves_the_styles_answers_alone() -> None:
    """Along the style's directions the merged update is the style's own; the soft limit 0 is the plain merge."""
    concept, style = file(0), file(1)
    hard = deltas(np_lora([concept, style], [1, 1]).file)
    for name, value in deltas(style).items():
        V = torch.linalg.svd(value).Vh[:3].T
        torch.testing.assert_close(hard[name] @ V, value @ V, rtol=1e-3, atol=1e-4)
    plain = deltas(concatenate([concept, style], [1, 1]).file)
    for name, value in deltas(np_lora([concept, style], [1, 1], mu=0.0).file).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-4)


def test_np_lora_of_an_untrained_style_is_the_concept() -> None:
    concept = LoraFile({"unet": {"a": layer(0)}})
    style = LoraFile({"unet": {"a": LoraLayer(layer(1).A, torch.zeros(9, 3), 2.0)}})
    assert principal_inputs(style.parts["unet"]["a"]).shape == (7, 0)
    torch.testing.assert_close(deltas(np_lora([concept, style], [1, 1]).file)["a"], deltas(concept)["a"])


def test_np_lora_refusals() -> None:
    with pytest.raises(InputError, match="two adapters, not 3"):
        np_lora([file(0)] * 3, [1, 1, 1])
    with pytest.raises(InputError, match="same layers, but 1 are in only one"):
        np_lora([file(0), LoraFile({"unet": {"a": layer(1)}})], [1, 1])
    with pytest.raises(InputError, match="mu must be from 0"):
        np_lora([file(0), file(1)], [1, 1], mu=-1)
    with pytest.raises(InputError, match="at least 1 direction"):
        np_lora([file(0), file(1)], [1, 1], directions=0)


# LoraHub


def test_lorahub_finds_the_weights_of_a_known_mixture() -> None:
    files = [file(0), file(1)]
    wanted = deltas(concatenate(files, [0.8, -0.4]).file)

    def loss(made: LoraFile) -> float:
        return sum(float((value - wanted[name]).square().mean()) for name, value in deltas(made).items())

    found = search(files, loss, steps=60, penalty=0.0)
    assert found.weights == pytest.approx((0.8, -0.4), abs=0.02)
    assert found.loss < 1e-2 * found.start
    assert found.tried <= 60
    assert search(files, loss, steps=12).weights == search(files, loss, steps=12).weights  # the same every time


def test_lorahub_stays_in_its_bounds_and_pays_for_weight() -> None:
    def reward(made: LoraFile) -> float:
        return -sum(float(value.norm()) for value in deltas(made).values())

    assert abs(search([file(0)], reward, steps=30).weights[0]) == pytest.approx(1.5, abs=1e-3)
    assert search([file(0)], lambda made: 0.0, steps=10).weights == (0.0,)


def test_lorahub_factors_have_cross_terms_and_exact_does_not() -> None:
    files = [file(0), file(1)]
    exact, factors = deltas(merged(files, [0.5, 0.5])), deltas(merged(files, [0.5, 0.5], "factors"))
    one, two = (item.parts["unet"]["a"] for item in files)
    cross = one.scale * 0.25 * (one.B + two.B) @ (one.A + two.A)
    torch.testing.assert_close(factors["a"], cross, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exact["a"], 0.5 * one.delta() + 0.5 * two.delta(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(exact["a"], factors["a"], atol=1e-2)
    assert all(not value.any() for value in deltas(merged(files, [0.0, 0.0])).values())


def test_lorahub_refusals() -> None:
    with pytest.raises(InputError, match="no adapter"):
        search([], lambda made: 0.0)
    with pytest.raises(InputError, match="at least 4 steps"):
        search([file(0), file(1)], lambda made: 0.0, steps=3)
    with pytest.raises(InputError, match="not a number"):
        search([file(0)], lambda made: float("nan"))
    with pytest.raises(InputError, match="same rank"):
        merged([file(0), file(1, rank=2)], [1, 1], "factors")
