"""Merging adapters into one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import InputError
from adapters.formats import LoraFile, LoraLayer
from adapters.merging.concatenate import concatenate, cut, join


def layer(rank: int, seed: int, conv: bool = False, alpha: float = 3.0) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    if conv:
        return LoraLayer(
            torch.randn(rank, 3, 3, 3, generator=generator), torch.randn(5, rank, 1, 1, generator=generator), alpha
        )
    return LoraLayer(torch.randn(rank, 6, generator=generator), torch.randn(4, rank, generator=generator), alpha)


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    conv=st.booleans(),
)
def test_concatenation_is_the_weighted_sum(ranks: list[int], weights: list[float], conv: bool) -> None:
    layers = [layer(rank, k, conv, alpha=1.0 + k) for k, rank in enumerate(ranks)]
    joined = join(list(zip(layers, weights, strict=False)))
    expected = sum(weight * one.delta() for one, weight in zip(layers, weights, strict=False))
    torch.testing.assert_close(joined.delta(), expected, atol=1e-5, rtol=1e-5)
    assert joined.rank == sum(ranks)
    assert joined.scale == 1.0


@pytest.mark.parametrize("conv", [False, True])
def test_cut_is_the_best_of_its_rank(conv: bool) -> None:
    whole = join([(layer(2, 0, conv), 1.0), (layer(2, 1, conv), 0.5)])
    smaller, error = cut(whole, 2)
    U, S, Vh = torch.linalg.svd(whole.delta().flatten(1))
    best = (U[:, :2] * S[:2]) @ Vh[:2]
    torch.testing.assert_close(smaller.delta().flatten(1), best, atol=1e-4, rtol=1e-4)
    assert error == pytest.approx(float(torch.linalg.vector_norm(S[2:]) / torch.linalg.vector_norm(S)), rel=1e-4)
    assert smaller.A.shape[1:] == whole.A.shape[1:]


def test_files_with_different_modules() -> None:
    one = LoraFile({"unet": {"x": layer(2, 0), "y": layer(2, 1)}})
    two = LoraFile({"unet": {"y": layer(3, 2)}, "text_encoder": {"z": layer(1, 3)}})
    merged = concatenate([one, two], [1.0, {"unet": 0.5, "text_encoder": 2.0}], [{"unet.x": 0.25}, {}])
    parts = merged.file.parts
    torch.testing.assert_close(parts["unet"]["x"].delta(), 0.25 * one.parts["unet"]["x"].delta())
    torch.testing.assert_close(
        parts["unet"]["y"].delta(), one.parts["unet"]["y"].delta() + 0.5 * two.parts["unet"]["y"].delta()
    )
    torch.testing.assert_close(parts["text_encoder"]["z"].delta(), 2 * two.parts["text_encoder"]["z"].delta())
    assert merged.errors == {}


def test_only_layers_above_the_rank_are_cut() -> None:
    one = LoraFile({"unet": {"x": layer(1, 0), "y": layer(2, 1)}})
    two = LoraFile({"unet": {"y": layer(2, 2)}})
    merged = concatenate([one, two], [1.0, 1.0], rank=2)
    assert list(merged.errors) == ["unet.y"]
    assert 0 < merged.errors["unet.y"] < 1
    assert {name: one.rank for _, name, one in merged.file.layers()} == {"x": 1, "y": 2}


def test_refusals() -> None:
    file = LoraFile({"unet": {"x": layer(2, 0)}})
    with pytest.raises(InputError, match="no adapter"):
        concatenate([], [])
    with pytest.raises(InputError, match="at least 1"):
        concatenate([file], [1.0], rank=0)
    with pytest.raises(InputError, match="would be empty"):
        concatenate([file], [0.0])
    dora = LoraFile({"unet": {"x": LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0, magnitude=torch.ones(2))}})
    with pytest.raises(InputError, match="DoRA"):
        concatenate([dora], [1.0])
