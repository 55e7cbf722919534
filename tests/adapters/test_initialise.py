"""Starts: the papers' identities, PEFT as a second opinion, captured statistics against autograd."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraGAConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters.errors import InputError
from adapters.initialise import start
from adapters.initialise.corda import corda_factors
from adapters.initialise.eva import eva_factor
from adapters.initialise.lora_ga import DIRECTIONS, ga_factors
from adapters.initialise.lora_sb import from_lora, sb_factors
from adapters.initialise.olora import olora_factors
from adapters.initialise.pissa import pissa_factors
from adapters.initialise.start import Start
from adapters.initialise.statistics import capture_gradients, capture_moments
from adapters.layers import variant


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- LoRA-GA


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", [(20, 14), (14, 20)])
def test_first_step_is_the_best_approximation_of_the_full_one(direction, shape):
    G, rank, gamma = matrix(*shape), 3, 16.0
    c2 = shape[0] ** 0.5 / gamma
    A0, B0 = ga_factors(G, rank, 2.0, gamma, direction)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    best = (U[:, :6] * S[:6]) @ Vh[:6]
    torch.testing.assert_close(G @ A0.T @ A0 + B0 @ B0.T @ G, c2 * best, rtol=1e-10, atol=1e-10)
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(A0 @ A0.T, c2 * eye, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(B0.T @ B0, c2 * eye, rtol=1e-10, atol=1e-10)
    for found, again in zip((A0, B0), ga_factors(100 * G, rank, 2.0, gamma, direction), strict=True):
        torch.testing.assert_close(again, found)


def test_one_small_sgd_step_moves_the_weight_so():
    W0, X, Y, s, rank = matrix(12, 10), matrix(40, 10, seed=1), matrix(40, 12, seed=2), 1.7, 2

    def loss(W):
        return (X @ W.T - Y).square().mean()

    W = W0.clone().requires_grad_()
    G = torch.autograd.grad(loss(W), W)[0]
    A0, B0 = ga_factors(G, rank, s)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    best, c2 = (U[:, :4] * S[:4]) @ Vh[:4], 12**0.5 / 16
    errors = []
    for step in (1e-2, 1e-3):
        A, B = A0.clone().requires_grad_(), B0.clone().requires_grad_()
        gA, gB = torch.autograd.grad(loss(W0 + s * (B @ A - B0 @ A0)), (A, B))
        change = s * ((B - step * gB) @ (A - step * gA) - B0 @ A0)
        errors.append(torch.linalg.matrix_norm(change / (-step * s**2 * c2) - best).item())
    assert errors[1] < 0.2 * errors[0]
    assert errors[1] < 1e-2 * torch.linalg.matrix_norm(best).item()


def test_sizes_of_the_start():
    G, W0, s = matrix(12, 10), matrix(12, 10, seed=5), 2.0
    assert torch.allclose(ga_factors(G, 2, s, size="unit")[0].norm(dim=1), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(ga_factors(G, 2, s, size="gd")[1].norm(dim=0), torch.full((2,), 0.5, dtype=torch.float64))
    wanted = (torch.linalg.svdvals(W0)[:2] / s).sqrt().mean()
    assert torch.allclose(ga_factors(G, 2, s, size="weightS", W0=W0)[0].norm(dim=1), wanted.expand(2))
    tiny = 1e-3 * W0
    A0, B0 = ga_factors(G, 2, s, size="unit", W0=tiny, norm_clip=True)
    torch.testing.assert_close((s * B0 @ A0).abs().max(), tiny.abs().max())


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_pefts_lora_ga_is_reproduced_up_to_signs(direction):
    """And with it what differs: singular values of the gradient in B, and no factor on A."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 12, bias=False))
    U, _, Vh = torch.linalg.svd(matrix(12, 16), full_matrices=False)
    G = ((U * 0.5 ** torch.arange(12)) @ Vh).float()  # PEFT's SVD is randomised: a spectrum it resolves
    base[0]._peft_loraga_grad = G
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights="lora_ga",
                        lora_ga_config=LoraGAConfig(direction=direction, scale="stable", stable_gamma=16))  # fmt: skip
    theirs = variant.pair(variant.adapted(get_peft_model(base, config))["0"])
    ours = ga_factors(G, 2, 2.0, 16.0, direction, "peft_0_21")
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.abs(), wanted.detach().abs(), rtol=1e-3, atol=1e-4)
    paper = ga_factors(G, 2, 2.0, 16.0, direction)
    assert paper[0].norm(dim=1).max() < 0.6 < theirs[0].norm(dim=1).min()  # c = 0.465 there, 1 in PEFT


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rank": 6}, "at most 5"),
        ({"gamma": 0.0}, "gamma"),
        ({"direction": "up"}, "use one of ArB2r"),
        ({"size": "big"}, "use one of stable"),
        ({"G": torch.zeros(10, 12)}, "zero everywhere"),
        ({"G": torch.full((10, 12), torch.nan)}, "not finite"),
    ],
)
def test_ga_refuses(changes, sentence):
    values: dict[str, Any] = {"G": matrix(10, 12), "rank": 2, "scale": 1.0, **changes}
    with pytest.raises(InputError, match=sentence):
        ga_factors(**values)


# ---------------------------------------------------------------- LoRA-SB


def test_sb_basis_is_orthonormal_and_reproduces_the_first_step():
    g, eta, s = matrix(12, 9), 0.01, 2.0
    A, B, R = sb_factors(g, 4, s, eta)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(A @ A.T, eye, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(B.T @ B, eye, rtol=1e-10, atol=1e-10)
    U, S, Vh = torch.linalg.svd(-eta * g.sign(), full_matrices=False)
    torch.testing.assert_close(s * B @ R @ A, (U[:, :4] * S[:4]) @ Vh[:4], rtol=1e-10, atol=1e-10)
    linear = sb_factors(g, 4, s, eta, linear=True)
    U, S, Vh = torch.linalg.svd(-eta * g, full_matrices=False)
    torch.testing.assert_close(s * linear[1] @ linear[2] @ linear[0], (U[:, :4] * S[:4]) @ Vh[:4])


def test_sb_gradient_is_the_projection_of_the_full_one():
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(9, 12)), LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    ).double()
    layer, x, target = variant.adapted(model)["0"], matrix(7, 9), matrix(7, 12, seed=1)
    A, B, R = sb_factors(matrix(12, 9, seed=2), 4, 2.0, 0.01)
    with torch.no_grad():
        for place, value in zip(variant.pair(layer), (A, B), strict=True):
            place.copy_(value)
    core = variant.set_core(layer, R)
    (model(x) - target).square().sum().backward()
    weight = (layer.get_base_layer().weight + 2 * B @ R @ A).detach().requires_grad_()
    F.linear(x, weight, layer.get_base_layer().bias).sub(target).square().sum().backward()
    torch.testing.assert_close(core.grad, 2 * B.T @ weight.grad @ A.T)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.0.lora_R.default.weight"
    ]


def test_an_ordinary_lora_becomes_a_basis_and_a_core():
    A, B = matrix(3, 9), matrix(12, 3, seed=1)
    left, right, core = from_lora(A, B, 2.0)[1], from_lora(A, B, 2.0)[0], from_lora(A, B, 2.0)[2]
    torch.testing.assert_close(left @ core @ right, B @ A)
    torch.testing.assert_close(right @ right.T, torch.eye(3, dtype=torch.float64))


def test_sb_refuses():
    with pytest.raises(InputError, match="at most 9"):
        sb_factors(matrix(12, 9), 10, 1.0, 0.1)
    with pytest.raises(InputError, match="larger than 0"):
        sb_factors(matrix(12, 9), 2, 1.0, 0.0)
    with pytest.raises(InputError, match="zero or not finite"):
        sb_factors(torch.zeros(12, 9), 2, 1.0, 0.1)


# ---------------------------------------------------------------- PiSSA, OLoRA, CorDA, EVA


@pytest.mark.parametrize(("name", "kind"), [("pissa", "pissa"), ("olora", "olora")])
def test_weight_based_starts_equal_pefts(name, kind):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 12))
    W0 = base[0].weight.detach().clone()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=kind)
    theirs = variant.pair(variant.adapted(get_peft_model(base, config))["0"])
    A, B = pissa_factors(W0, 4, 2.0) if name == "pissa" else olora_factors(W0, 4)
    torch.testing.assert_close(B @ A, (theirs[1] @ theirs[0]).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(A.abs(), theirs[0].detach().abs(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_equals_pefts(mode):
    pytest.importorskip("attr")  # PEFT's module needs it and does not say so
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(10, 8)), torch.randn(3, 1, 20, 10)
    ours = copy.deepcopy(base)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights="corda",
                        corda_config=CordaConfig(corda_method=mode))  # fmt: skip
    preprocess_corda(base, config, run_model=lambda: [base(part) for part in x])
    W0 = base[0].weight.detach().clone()
    theirs = variant.pair(variant.adapted(get_peft_model(base, config))["0"])
    moments = capture_moments({"0": ours[0]}, [lambda part=part: ours(part).sum() for part in x], 3, scaled=True)
    A, B = corda_factors(W0, moments["0"], 2, 2.0, mode)
    torch.testing.assert_close(B @ A, (theirs[1] @ theirs[0]).detach(), rtol=1e-3, atol=1e-4)


def test_corda_whole_rank_gives_the_weight_back():
    W0, X = matrix(6, 8), matrix(50, 8, seed=1)
    A, B = corda_factors(W0, X.T @ X / 50, 6, 1.0)
    torch.testing.assert_close(B @ A, W0, rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match="only zero inputs"):
        corda_factors(W0, torch.zeros(8, 8, dtype=torch.float64), 2, 1.0)


def test_eva_directions_are_the_inputs_singular_vectors():
    X = matrix(50, 8) * torch.arange(1, 9)
    found = eva_factor(X.T @ X, 3)
    wanted = torch.linalg.svd(X, full_matrices=False).Vh[:3]
    torch.testing.assert_close(found.abs(), wanted.abs())


# ---------------------------------------------------------------- statistics


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "conv1d": (lambda: Conv1D(5, 6), (4, 3, 6)),
    "conv": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (4, 3, 7, 7)),
    "dilated": (lambda: nn.Conv2d(3, 5, (3, 2), dilation=2), (4, 3, 8, 8)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_captured_gradient_is_autograds_on_a_frozen_base(kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make().double()
    batches = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]

    def losses(module):
        return [lambda x=x: module(x).square().mean() for x in batches]

    wanted = torch.zeros_like(layer.weight)
    for closure in losses(layer):
        layer.weight.grad = None
        closure().backward()
        wanted += layer.weight.grad / 3
    layer.requires_grad_(False)
    found = capture_gradients({"x": layer}, losses(layer), 3)["x"]
    wanted = wanted.T if kind == "conv1d" else wanted.flatten(1)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert not layer._forward_hooks


def test_moments_of_a_convolution_are_those_of_its_patches():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 5, 3, stride=2, padding=1), torch.randn(2, 3, 7, 7)
    found = capture_moments({"x": layer}, [lambda: layer(x).sum()], 1)["x"]
    patches = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 27)
    torch.testing.assert_close(found, patches.T @ patches)


def test_capture_refuses():
    layer = nn.Linear(3, 3)
    with pytest.raises(InputError, match="set init_batches to 1"):
        capture_gradients({"x": layer}, [lambda: layer(torch.randn(2, 3)).sum()], 2)
    unused = nn.Linear(3, 3)
    with pytest.raises(InputError, match=r"no gradient .y"):
        capture_gradients({"x": layer, "y": unused}, [lambda: layer(torch.randn(2, 3)).sum()], 1)
    with pytest.raises(InputError, match=r"not x .Embedding"):
        capture_gradients({"x": nn.Embedding(3, 3)}, [], 1)


# ---------------------------------------------------------------- on a model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.mid, self.out = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(6, 8), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.out(self.drop(torch.tanh(self.mid(torch.tanh(self.conv(x)).mean((2, 3))))))


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "lora_ga", "eva", "lora_sb"])
def test_every_start_on_linear_and_convolution(name):
    net = Net()
    kept = copy.deepcopy(net.state_dict())
    model = get_peft_model(net, LoraConfig(r=2, lora_alpha=4, target_modules=["conv", "mid", "out"])).train()
    x = torch.randn(5, 2, 6, 6)
    batches = [torch.randn(3, 2, 6, 6) for _ in range(2)]
    model.eval()
    before = model(x)
    model.train()
    state = torch.get_rng_state()
    start.apply(
        Start(name, batches=2, rate=0.01),
        {"model": model},
        lambda n: ((lambda b=b: model(b).square().mean()) for b in itertools.islice(batches, n)),
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    if name == "lora_sb":
        assert not torch.allclose(model(x), before)
    else:
        assert torch.equal(model(x), before)
    for key, value in kept.items():
        part, _, leaf = key.rpartition(".")
        assert torch.equal(model.get_submodule(f"base_model.model.{part}.base_layer").state_dict()[leaf], value)
    assert all(offset is not None for offset in map(variant.offset_of, variant.adapted(model).values())) == (
        name not in ("eva", "lora_sb")
    )


def test_a_start_names_the_layer_it_cannot_work_with():
    model = get_peft_model(Net(), LoraConfig(r=4, target_modules=["out", "mid"]))
    with pytest.raises(InputError, match=r"model\.(out|mid): .*at most"):
        start.apply(
            Start("lora_ga", batches=1), {"model": model}, lambda n: [lambda: model(torch.randn(3, 2, 6, 6)).sum()]
        )
    with pytest.raises(InputError, match="none were given"):
        start.apply(Start("eva"), {"model": model})


def test_a_start_much_worse_than_the_base_is_shortened():
    def outcome(rate: float) -> tuple[float, float, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["mid", "out"])).eval()
        x = torch.randn(6, 2, 6, 6)
        loss = lambda: model(x).square().mean()  # noqa: E731
        before = loss().item()
        start.apply(Start("lora_sb", batches=1, rate=rate), {"model": model}, lambda n: [loss])
        return before, loss().item(), {name: variant.core_of(layer) for name, layer in variant.adapted(model).items()}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before, after, small = outcome(1e-3)  # fine as it is: nothing is said and nothing changed
    assert after < before
    with pytest.warns(UserWarning, match=r"'lora_sb' raised the loss .* shortened to 1/(\d+)") as said:
        before, after, bounded = outcome(16.0)
    assert after <= (1 + start.WORSE) * before
    halved = int(str(said[0].message).split("1/")[1].split(",")[0])
    for name, core in bounded.items():
        torch.testing.assert_close(core, small[name] * (16.0 / 1e-3 / halved), rtol=1e-4, atol=1e-7)


def test_a_start_that_stays_worse_is_refused():
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["mid"])).eval()
    x, calls = torch.randn(6, 2, 6, 6), itertools.count()

    def loss() -> torch.Tensor:
        found = model(x).square().mean()
        return found if next(calls) == 0 else found + torch.inf

    with pytest.raises(InputError, match="however short its step: lower learning_rate"):
        start.apply(Start("lora_sb", batches=1, rate=1e-3), {"model": model}, lambda n: [loss])
