"""The composite layer variant: parts, export, merging, quick algebra."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters.errors import InputError
from adapters.formats import LoraFile, write_peft
from adapters.layers import variant
from adapters.low_rank import compact_svd, row_norms_squared, shifted_row_norms_squared, top_singular, truncated_svd
from tests import tiny

KINDS = ("linear", "conv1d", "conv", "pointwise")


def wrapped(kind: str, rank: int = 3, alpha: float = 6.0, **options):
    """A PeftModel around one layer, its adapter with random B, and an input (fp64)."""
    torch.manual_seed(0)
    layer = {
        "linear": lambda: nn.Linear(10, 8),
        "conv1d": lambda: Conv1D(8, 10),
        "conv": lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1),
        "pointwise": lambda: nn.Conv2d(10, 8, 1),
    }[kind]()
    x = {"linear": (2, 5, 10), "conv1d": (2, 5, 10), "conv": (2, 4, 6, 6), "pointwise": (2, 10, 4, 4)}[kind]
    fan = {"fan_in_fan_out": True} if kind == "conv1d" else {}
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], **fan, **options)
    model = get_peft_model(nn.Sequential(layer), config).double()
    found = variant.adapted(model)["0"]
    with torch.no_grad():
        variant.pair(found)[1].normal_()
    return model, found, torch.randn(x, dtype=torch.float64)


def delta_of(layer):
    return layer.get_delta_weight("default").detach().clone()


@pytest.mark.parametrize("kind", KINDS)
def test_offset_changes_nothing_at_the_start(kind):
    model, layer, x = wrapped(kind)
    with model.disable_adapter():
        base = model(x)
    A, B = (torch.randn_like(tensor) for tensor in variant.pair(layer))
    weight = layer.get_base_layer().weight.clone()
    variant.set_offset(layer, A, B)
    assert torch.equal(model(x), base)
    assert torch.equal(layer.get_base_layer().weight, weight)
    with torch.no_grad():
        variant.pair(layer)[1].add_(0.1)
    assert not torch.allclose(model(x), base)
    with model.disable_adapter():
        assert torch.equal(model(x), base)


@pytest.mark.parametrize("part", ["offset", "core", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_export_merge_and_forward_agree(kind, part, tmp_path):
    model, layer, x = wrapped(kind, use_rslora=part == "offset")
    if part == "offset":
        variant.set_offset(layer, *(torch.randn_like(tensor) for tensor in variant.pair(layer)))
        with torch.no_grad():
            variant.pair(layer)[0].add_(torch.randn_like(variant.pair(layer)[0]))
    elif part == "core":
        variant.set_core(layer, torch.randn(3, 3))
    wanted = model(x)
    exported = variant.read_layers(model)["0"]
    assert exported.rank == (6 if part == "offset" else 3)
    plain = get_peft_model(
        nn.Sequential(copy.deepcopy(layer.get_base_layer())),
        LoraConfig(r=exported.rank, lora_alpha=exported.alpha, target_modules=["0"], use_rslora=exported.rslora,
                   fan_in_fan_out=kind == "conv1d"),
    ).double()  # fmt: skip
    other = variant.adapted(plain)["0"]
    with torch.no_grad():
        for target, value in zip(variant.pair(other), (exported.A, exported.B), strict=True):
            target.copy_(value)
    torch.testing.assert_close(plain(x), wanted, rtol=1e-9, atol=1e-9)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(x), wanted, rtol=1e-9, atol=1e-9)
    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)


def test_written_offset_loads_in_plain_peft(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"]))
    for layer in variant.adapted(model).values():
        variant.set_offset(layer, *(torch.randn_like(tensor) for tensor in variant.pair(layer)))
        with torch.no_grad():
            variant.pair(layer)[1].add_(0.3)
    x = torch.randn(3, 6)
    write_peft(LoraFile({"model": variant.read_layers(model)}), tmp_path / "out")
    loaded = PeftModel.from_pretrained(untouched, tmp_path / "out")
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


def test_embedding_offset():
    model = get_peft_model(nn.Sequential(nn.Embedding(7, 5)), LoraConfig(r=2, target_modules=["0"]))
    layer, ids = variant.adapted(model)["0"], torch.tensor([[1, 2, 6]])
    with model.disable_adapter():
        base = model(ids)
    variant.set_offset(layer, *(torch.randn_like(tensor) for tensor in variant.pair(layer)))
    assert torch.equal(model(ids), base)
    with torch.no_grad():
        layer.lora_embedding_B["default"].add_(1.0)
    wanted = model(ids)
    torch.testing.assert_close(model.merge_and_unload()(ids), wanted)


def test_parts_move_with_the_model_and_are_in_no_state_dict():
    model, layer, x = wrapped("linear")
    variant.set_offset(layer, *(torch.randn_like(tensor) for tensor in variant.pair(layer)))
    assert not [key for key in model.state_dict() if "offset" in key.lower() or "A0" in key]
    model.to(torch.float32)
    assert variant.offset_of(layer)[0].dtype == torch.float32
    assert model(x.float()).dtype == torch.float32


def test_a_diffusers_model_takes_parts():
    unet = tiny.unet()
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"]))
    noisy, words = torch.randn(1, 4, 16, 16), torch.randn(1, 16, 16)
    with torch.no_grad():
        before = unet(noisy, 5, words).sample
        for layer in variant.adapted(unet).values():
            variant.set_offset(layer, *(torch.randn_like(tensor) for tensor in variant.pair(layer)))
        assert torch.equal(unet(noisy, 5, words).sample, before)
    assert isinstance(unet, diffusers.UNet2DConditionModel)


def test_frozen_stays_frozen_through_switches():
    """PEFT's function for this is private: if it goes, this test says so."""
    model, layer, _ = wrapped("linear")
    variant.freeze(layer, "lora_A")
    variant.set_core(layer, torch.eye(3))
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    assert [p.requires_grad for p in variant.pair(layer)] == [False, False]
    assert variant.core_of(layer).requires_grad


def test_a_layer_of_another_kind_is_refused():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"], use_dora=True))
    with pytest.raises(InputError, match="DoraLinearVariant"):
        variant.attach(variant.adapted(model)["0"])


@pytest.mark.parametrize("kind", KINDS)
def test_effective_update_is_the_layers_own(kind):
    _, layer, _ = wrapped(kind)
    left, right = variant.effective(layer)
    weight = layer.get_base_layer().weight
    dense = delta_of(layer)
    torch.testing.assert_close(variant.delta_like(layer, "default", weight), dense)
    flat = dense.T if kind == "conv1d" else dense.flatten(1)
    torch.testing.assert_close(layer.scaling["default"] * left @ right, flat)
    assert variant.base_weight(layer).shape == flat.shape


def test_gram_norms_equal_dense_norms():
    g = torch.Generator().manual_seed(1)
    L, R, W = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((9, 3), (3, 7), (9, 7)))
    torch.testing.assert_close(row_norms_squared(L, R), (L @ R).square().sum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shifted_row_norms_squared(W, L, R), (W + L @ R).square().sum(1), rtol=1e-12, atol=1e-12)
    assert (row_norms_squared(torch.zeros(9, 3), torch.zeros(3, 7)) == 0).all()


def test_decompositions_equal_the_exact_svd():
    g = torch.Generator().manual_seed(2)
    L, R = torch.randn(30, 4, generator=g, dtype=torch.float64), torch.randn(4, 20, generator=g, dtype=torch.float64)
    U, S, Vh = compact_svd(L, R)
    torch.testing.assert_close((U * S) @ Vh, L @ R)
    decaying = torch.linalg.svd(torch.randn(60, 50, generator=g, dtype=torch.float64), full_matrices=False)
    M = (decaying.U * 0.8 ** torch.arange(50)) @ decaying.Vh
    state = torch.get_rng_state()
    U, S, Vh = truncated_svd(M, 5, exact_below=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(S, 0.8 ** torch.arange(5, dtype=torch.float64))
    torch.testing.assert_close((U * S) @ Vh, (decaying.U[:, :5] * S) @ decaying.Vh[:5], rtol=1e-4, atol=1e-4)


def test_hard_spectrum_falls_back_to_the_exact_one():
    g = torch.Generator().manual_seed(3)
    M = torch.linalg.qr(torch.randn(80, 80, generator=g, dtype=torch.float64))[0]  # all singular values equal
    M = M + 1e-6 * torch.randn(80, 80, generator=g, dtype=torch.float64)
    _, S, _ = top_singular(lambda x: M @ x, lambda y: M.T @ y, M, 3, steps=1, tolerance=1e-12)
    torch.testing.assert_close(S, torch.linalg.svdvals(M)[:3], rtol=1e-12, atol=1e-12)


def test_products_follow_the_geometry():
    _, layer, x = wrapped("conv")
    down, up = variant.pair(layer)
    found = variant.product(layer, "default", x, down.flatten(1), up.flatten(1))
    torch.testing.assert_close(found, F.conv2d(F.conv2d(x, down, None, 2, 1), up))
