"""Extraction: the difference of two models as the nearest LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from adapters.errors import FamilyError, InputError
from adapters.merging.extract import extract, nearest
from tests.adapters.test_formats import Toy


def changed(seed: int = 1, rank: int | None = None, bias: bool = False) -> tuple[Toy, Toy]:
    torch.manual_seed(0)
    base = Toy()
    tuned = copy.deepcopy(base)
    torch.manual_seed(seed)
    for module in tuned.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            out, columns = module.weight.shape[0], module.weight[0].numel()
            inner = rank or min(out, columns)
            change = torch.randn(out, inner) @ torch.randn(inner, columns)
            module.weight.data += change.reshape(module.weight.shape)
            if bias:
                module.bias.data += 1
    return base, tuned


def test_a_low_rank_change_comes_back_exactly() -> None:
    base, tuned = changed(rank=2)
    made = extract({"unet": base}, {"unet": tuned}, rank=2)
    assert made.file.counts() == {"unet": 4}
    assert made.worst[1] < 1e-3
    for _, name, layer in made.file.layers():
        wanted = tuned.get_submodule(name).weight - base.get_submodule(name).weight
        torch.testing.assert_close(layer.delta(), wanted, rtol=1e-4, atol=1e-4)


def test_the_error_is_the_true_one_and_falls_with_the_rank() -> None:
    base, tuned = changed()
    last = 1.0
    for rank in (1, 2, 3):
        made = extract({"unet": base}, {"unet": tuned}, rank=rank)
        for _, name, layer in made.file.layers():
            wanted = tuned.get_submodule(name).weight - base.get_submodule(name).weight
            true = float((layer.delta() - wanted).detach().norm() / wanted.detach().norm())
            assert made.errors[f"unet.{name}"] == pytest.approx(true, abs=1e-5)
        assert made.worst[1] <= last
        last = made.worst[1]


def test_energy_gives_the_smallest_rank_that_keeps_it() -> None:
    left, _ = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    right, _ = torch.linalg.qr(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))
    difference = left @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ right.T  # energies 9, 4, 1 of 14
    assert [nearest(difference, energy=share)[0].rank for share in (0.6, 0.65, 0.9, 0.93)] == [1, 2, 2, 3]
    layer, error = nearest(difference, rank=1, energy=0.99)
    assert layer.rank == 1
    assert error == pytest.approx((5 / 14) ** 0.5, abs=1e-6)


def test_what_a_lora_cannot_hold_is_reported() -> None:
    base, tuned = changed(rank=1, bias=True)
    made = extract({"unet": base}, {"unet": tuned}, rank=1)
    assert sorted(made.left_out) == [
        f"unet.down_blocks.0.{name}.bias" for name in ("attn1.to_out.0", "attn1.to_q", "conv", "proj")
    ]


def test_refusals() -> None:
    base, tuned = changed()
    with pytest.raises(InputError, match="same linear layers"):
        extract({"unet": base}, {"unet": copy.deepcopy(base)}, rank=1)
    with pytest.raises(InputError, match="how much to keep"):
        extract({"unet": base}, {"unet": tuned})
    with pytest.raises(InputError, match="between 0 and 1"):
        extract({"unet": base}, {"unet": tuned}, energy=1.5)
    with pytest.raises(FamilyError, match="different parts"):
        extract({"unet": base}, {"transformer": tuned}, rank=1)
    tuned.down_blocks[0]["conv"] = nn.Conv2d(4, 5, 3)
    with pytest.raises(FamilyError, match=r"conv\.weight' is \(5, 3, 3, 3\)"):
        extract({"unet": base}, {"unet": tuned}, rank=1)
