"""Intruder dimensions: known cases, the exact SVD and PEFT as second opinions, the closed form of the mitigation."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters.errors import InputError
from adapters.formats import LoraFile, LoraLayer
from adapters.inspection import intruders
from adapters.inspection.forgetting import added, sweep
from adapters.inspection.intruders import between, find, inspect, mitigate, shrink, soften, spectrum, weights_of
from adapters.layers import variant


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def strong(shape=(24, 16), rank: int = 3, seed: int = 1, size: float = 4.0) -> LoraLayer:
    return LoraLayer(matrix(rank, shape[1], seed=seed), size * matrix(shape[0], rank, seed=seed + 1), float(rank))


def parts(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.scale * layer.B.flatten(1), layer.A.flatten(1)


def test_nothing_changed_means_no_intruders():
    for shape in ((20, 12), (12, 20), (12, 12)):
        W0 = matrix(*shape)
        found = find(W0, torch.zeros(shape[0], 1), torch.zeros(1, shape[1]))
        assert found.intruders == ()
        torch.testing.assert_close(found.cosines, torch.ones(10).double())


def test_a_strong_foreign_direction_is_one_intruder_in_front():
    W0 = matrix(20, 8)
    U, S, Vh = torch.linalg.svd(W0)
    foreign = U[:, 12:13]  # outside the column space
    cosines = []
    for size in (100, 1000):
        found = find(W0, size * S[0] * foreign, Vh[3:4], k=5)
        assert found.intruders == (0,)
        cosines.append(float(found.cosines[0]))
    assert cosines[1] < cosines[0] < 0.02


def test_scaling_the_bases_own_direction_is_none():
    W0 = matrix(12, 20)
    U, _, Vh = torch.linalg.svd(W0, full_matrices=False)
    assert find(W0, 50 * U[:, 4:5], Vh[4:5]).intruders == ()


def test_counts_grow_with_eps_and_k():
    W0, layer = matrix(24, 16), strong()
    by_eps = [len(find(W0, *parts(layer), eps=eps).intruders) for eps in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)]
    by_k = [len(find(W0, *parts(layer), k=k, eps=0.7).intruders) for k in (1, 4, 8, 16)]
    assert by_eps == sorted(by_eps)
    assert by_k == sorted(by_k)
    assert by_eps[-2] > 0


def test_quick_path_finds_what_exact_svds_find(monkeypatch):
    monkeypatch.setattr(intruders, "EXACT", 1)
    for seed in range(20):
        shape = ((40, 24), (24, 40), (30, 30))[seed % 3]
        W0, layer = matrix(*shape, seed=seed), strong(shape, seed=seed + 50, size=1.5)
        dense = torch.linalg.svd(W0 + parts(layer)[0] @ parts(layer)[1])[0][:, :10]
        U = torch.linalg.svd(W0, full_matrices=False)[0]
        cosines = (U.T @ dense).abs().max(0).values
        wanted = tuple(j for j in range(10) if cosines[j] < 0.5)
        near = (cosines - 0.5).abs().min()
        found = find(W0, *parts(layer))
        assert near < 1e-3 or found.intruders == wanted
        torch.testing.assert_close(found.cosines, cosines, rtol=0, atol=1e-2)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.5])
def test_closed_form_equals_the_dense_formula(strength):
    W0, layer = matrix(24, 16), strong()
    found = find(W0, *parts(layer), k=6)
    assert found.intruders
    W1 = W0 + parts(layer)[0] @ parts(layer)[1]
    Y, T, Zh = torch.linalg.svd(W1, full_matrices=False)
    wanted = W1 + sum((strength - 1) * T[j] * torch.outer(Y[:, j], Zh[j]) for j in found.intruders)
    softened = mitigate(layer, found, strength)
    assert softened.rank == 3 + len(found.intruders)
    result = W0 + softened.scale * softened.B @ softened.A
    torch.testing.assert_close(result, wanted, rtol=1e-10, atol=1e-10)
    if strength == 0:
        for j in found.intruders:
            assert abs(float(Y[:, j] @ result @ Zh[j])) < 1e-9
    assert mitigate(layer, found, 1.0) is layer


class Net(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv1d = nn.Embedding(15, 12), Conv1D(14, 12)
        self.linear, self.conv = nn.Linear(14, 16), nn.Conv2d(4, 12, 3, padding=1)

    def forward(self, ids):
        hidden = self.linear(torch.tanh(self.conv1d(self.embed(ids))))
        return self.conv(hidden.reshape(-1, 4, 2, 2)).mean((2, 3))


def tuned_net() -> tuple[Net, Net]:
    base = Net()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, seed in (("embed", 1), ("conv1d", 2), ("linear", 3), ("conv", 4)):
            weight = tuned.get_submodule(name).weight
            flat = weight.flatten(1)
            push = torch.outer(matrix(flat.shape[0], seed=seed), matrix(flat.shape[1], seed=seed + 9)).float()
            weight.add_(2 * push.reshape(weight.shape))
    return base, tuned


def test_a_pair_of_checkpoints_of_every_layer_kind():
    base, tuned = tuned_net()
    file = between({"model": base}, {"model": tuned})
    assert {m for _, m, _ in file.layers()} == {"embed", "conv1d", "linear", "conv"}
    report, found = inspect(file, weights_of({"model": base}), eps=0.7)
    assert {layer.name.split(".")[-1]: layer.shape for layer in report.layers} == {
        "embed": (12, 15), "conv1d": (14, 12), "linear": (16, 14), "conv": (12, 36),
    }  # fmt: skip
    for layer in report.layers:
        assert layer.intruders >= 1
        assert layer.stable_rank == pytest.approx(1, abs=1e-3)
        assert 0 < layer.captured <= 1
    with added({"model": base}, file):
        for name in ("embed", "conv1d", "linear", "conv"):
            torch.testing.assert_close(base.get_submodule(name).weight, tuned.get_submodule(name).weight)
    removed, _ = soften(file, found, 0.0)
    untouched = copy.deepcopy(base)
    with added({"model": base}, removed):
        again, _ = inspect(between({"model": untouched}, {"model": base}), weights_of({"model": untouched}))
    assert again.layers[0].tuned_norm < report.layers[0].tuned_norm
    assert report.to_dict()["total"] == report.total == sum(report.by_kind().values())
    with pytest.raises(InputError, match="nothing to inspect"):
        between({"model": base}, {"model": copy.deepcopy(base)})


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_sides(side):
    file = LoraFile({"model": {"x": strong((16, 14), rank=2)}})
    base = nn.Sequential()
    base.add_module("x", nn.Linear(14, 16))
    report, found = inspect(file, weights_of({"model": base}), side=side)
    assert len(found["model", "x"]) == (2 if side == "both" else 1)
    turned = LoraFile({"model": {"x": LoraLayer(file.parts["model"]["x"].B.T, file.parts["model"]["x"].A.T, 2.0)}})
    flipped = nn.Sequential()
    flipped.add_module("x", nn.Linear(16, 14))
    flipped.x.weight.data = base.x.weight.data.T.clone()
    other = {"left": "right", "right": "left", "both": "both"}[side]
    assert inspect(turned, weights_of({"model": flipped}), side=other)[0].total == report.total


def test_live_layers_give_what_files_give():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(14, 16))
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, target_modules=["0"], use_rslora=True))
    layer = variant.adapted(model)["0"]
    variant.set_offset(layer, torch.randn(2, 14), torch.randn(16, 2))
    with torch.no_grad():
        variant.pair(layer)[1].add_(torch.randn(16, 2))
    file = LoraFile({"model": variant.read_layers(model)})
    live, _ = inspect(file, lambda component, module: variant.base_weight(layer))
    assert live == inspect(file, weights_of({"model": untouched}))[0]


def test_pefts_tool_finds_and_scales_the_same_on_plain_linear_layers():
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(14, 16))
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=3, target_modules=["0"]))
    layer = variant.adapted(model)["0"]
    with torch.no_grad():
        variant.pair(layer)[1].normal_()
    file = LoraFile({"model": variant.read_layers(model)})
    report, found = inspect(file, lambda *_: variant.base_weight(layer), k=10)
    lines: list[str] = []
    reduce_intruder_dimension(model, top_k=10, threshold_epsilon=0.5, mitigation_lambda=0.25, logging_sink=lines.append)
    assert f"Intruders: {report.total}" in lines[0]
    ours, _ = soften(file, found, 0.25, recompress=True)  # PEFT cuts to rank r without saying so
    theirs = layer.get_delta_weight("intruder_reduced").detach()
    torch.testing.assert_close(ours.parts["model"]["0"].delta(), theirs, rtol=1e-3, atol=1e-4)


def test_forgetting_has_the_control_beside_it():
    base, _ = tuned_net()
    kept = copy.deepcopy(base.state_dict())
    ids = torch.arange(12)[None]
    old = base(ids).detach()
    file = LoraFile({"model": {"linear": strong((16, 14), rank=2, size=0.5)}})
    _, found = inspect(file, weights_of({"model": base}))
    rows = sweep(
        {"model": base}, file, found, {"old": lambda: (base(ids) - old).square().mean().item()}, (1.0, 0.5, 0.0)
    )
    assert [row.variant for row in rows] == ["base", "adapter", *["intruders scaled", "whole update shrunk"] * 2]
    assert rows[0].losses["old"] == 0 < rows[1].losses["old"]
    assert rows[3].norm == pytest.approx(rows[2].norm, rel=1e-4)
    assert all(torch.equal(value, kept[name]) for name, value in base.state_dict().items())
    half = shrink(file, 0.5).parts["model"]["linear"]
    torch.testing.assert_close(half.delta(), 0.5 * file.parts["model"]["linear"].delta())


def test_near_equal_values_are_called_ambiguous():
    U = torch.linalg.qr(matrix(12, 12))[0]
    W0 = U * torch.cat([torch.full((4,), 5.0), torch.arange(1.0, 9.0).flip(0) / 3]).double() @ U.T
    turn = U[:, :4] @ torch.full((4, 1), 0.5).double()  # a quarter of four equal vectors each
    found = find(W0, 3 * turn, turn.T, eps=0.9, k=1)
    assert found.intruders == (0,)
    assert float(found.groups[0]) > 0.99


def test_bad_input():
    file = LoraFile({"model": {"x": strong((16, 14))}})
    base = nn.Sequential()
    base.add_module("x", nn.Linear(14, 16))
    weights = weights_of({"model": base})
    _, found = inspect(file, weights)
    broken = LoraFile({"model": {"x": LoraLayer(torch.full((2, 14), torch.nan), torch.ones(16, 2), 2.0)}})
    for call, sentence in (
        (lambda: inspect(file, weights, k=0), "k must be from 1 to 14"),
        (lambda: inspect(file, weights, k=15), "k must be from 1 to 14"),
        (lambda: inspect(file, weights, eps=0), "eps is a cosine"),
        (lambda: inspect(file, weights, side="top"), "'left', 'right' or 'both'"),
        (lambda: inspect(LoraFile({}), weights), "no layers"),
        (lambda: inspect(LoraFile({"unet": {"x": strong()}}), weights), r"unet.x: the base has no 'unet'"),
        (lambda: inspect(LoraFile({"model": {"y": strong()}}), weights), "no such module"),
        (lambda: inspect(LoraFile({"model": {"x": strong()}}), weights), "the base weight 16 x 14"),
        (lambda: inspect(broken, weights), "not finite"),
        (lambda: soften(file, found, -1), "lambda must be 0"),
    ):
        with pytest.raises(InputError, match=sentence):
            call()
    assert spectrum(torch.zeros(4, 3)).U.shape[1] == 0
