"""ALLoRA, perturbations, FFA: gradients against autograd on dense weights, statistics of the noise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from adapters.errors import InputError
from adapters.layers import variant
from adapters.learn.allora import AlloraRule, ScaledSteps, row_factors
from adapters.learn.direction import direction, gradient_of, gradient_row_norms, weight_row_norms
from adapters.learn.ffa import freeze_a
from adapters.learn.ggpo import RowNoise, noise_blocks, noise_seed, row_deviations
from adapters.learn.mgpo import MomentumBranch, momentum_of
from tests.adapters.test_variant import wrapped

PARTS = ("plain", "offset")


def case(kind: str, part: str = "plain", alpha: float = 3.0):
    """A layer with s = 1 (alpha = r), random A and B, and a target's gradient."""
    model, layer, x = wrapped(kind, alpha=alpha)
    if part == "offset":
        variant.set_offset(layer, *(torch.randn_like(tensor) for tensor in variant.pair(layer)))
        with torch.no_grad():
            for tensor in variant.pair(layer):
                tensor.add_(0.3 * torch.randn_like(tensor))
    x.requires_grad_()
    return model, layer, x


def dense_output(layer, x, weight):
    base = layer.get_base_layer()
    if isinstance(base, nn.Conv2d):
        return F.conv2d(x, weight.reshape(-1, *base.weight.shape[1:]), base.bias, base.stride, base.padding)
    return F.linear(x, weight, base.bias)


def dense_weight(layer):
    left, right = variant.effective(layer)
    return (variant.base_weight(layer) + layer.scaling["default"] * left @ right).clone().requires_grad_()


def target(model, x):
    return torch.randn(model(x).shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# ---------------------------------------------------------------- ALLoRA


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["linear", "conv", "pointwise"])
def test_allora_scales_parameter_gradients_by_row_and_nothing_else(kind, part):
    model, layer, x = case(kind, part)
    A, B = variant.pair(layer)
    plain = model(x)
    g = target(model, x)
    (plain * g).sum().backward()
    gx = x.grad.clone()
    weight = dense_weight(layer)
    D = torch.autograd.grad((dense_output(layer, x, weight) * g).sum(), weight)[0]
    for tensor in (x, A, B):
        tensor.grad = None
    variant.attach(layer).rule = AlloraRule(2.0)
    ruled = model(x)
    assert torch.equal(ruled, plain)
    (ruled * g).sum().backward()
    n = (weight - variant.base_weight(layer)).norm(dim=1)
    a = 1 / (n + 1 / 4).sqrt()
    torch.testing.assert_close(x.grad, gx)
    torch.testing.assert_close(B.grad.flatten(1), a[:, None] * D @ A.flatten(1).T)
    torch.testing.assert_close(A.grad.flatten(1), B.flatten(1).T @ (a[:, None] * D))


def test_allora_factor():
    assert torch.allclose(row_factors(torch.zeros(5, 2), torch.randn(2, 7), 3.0), torch.full((5,), 3.0))
    growing = torch.arange(1.0, 6.0)[:, None].double() * torch.ones(5, 1)
    a = row_factors(growing, torch.ones(1, 4).double(), 2.0)
    assert (a.diff() < 0).all()
    torch.testing.assert_close(a, 1 / (2 * torch.arange(1.0, 6.0).double() + 0.25).sqrt())


@pytest.mark.parametrize("zero", ["A", "B", "both"])
def test_allora_is_finite_where_matrices_are_zero(zero):
    model, layer, x = case("linear")
    A, B = variant.pair(layer)
    with torch.no_grad():
        for name, tensor in (("A", A), ("B", B)):
            if zero in (name, "both"):
                tensor.zero_()
    variant.attach(layer).rule = AlloraRule()
    model(x).square().sum().backward()
    assert A.grad.isfinite().all()
    assert B.grad.isfinite().all()


def test_allora_under_autocast_is_plain_lora_to_the_bit():
    model, layer, x = case("linear")
    model, x = model.float(), x.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        variant.attach(layer).rule = AlloraRule()
        ruled = model(x)
    assert torch.equal(plain, ruled)
    ruled.float().square().sum().backward()
    assert variant.pair(layer)[0].grad.dtype == torch.float32


def test_scaled_steps_scale_the_update():
    model, layer, x = case("linear")
    A, B = variant.pair(layer)
    optimizer = torch.optim.AdamW([A, B], 0.1, weight_decay=0.0)
    before = A.detach().clone(), B.detach().clone()
    model(x).square().sum().backward()
    grads = A.grad.clone(), B.grad.clone()
    steps = ScaledSteps({"x": layer}, 2.0)
    steps.attach(optimizer)
    a = row_factors(B.detach(), A.detach(), 2.0)
    optimizer.step()
    torch.testing.assert_close(B - before[1], -0.1 * a[:, None] * grads[1].sign(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(A - before[0], -0.1 * a.mean() * grads[0].sign(), rtol=1e-4, atol=1e-6)
    steps.detach()
    optimizer.step()


# ---------------------------------------------------------------- perturbations


@pytest.mark.parametrize("part", [*PARTS, "core", "frozen"])
@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d"])
def test_gradient_norms_are_those_of_the_dense_direction(kind, part):
    model, layer, x = case(kind, part if part in PARTS else "plain", alpha=6.0)
    if part == "core":
        variant.set_core(layer, torch.randn(3, 3).double())
    if part == "frozen":
        variant.freeze(layer, "lora_A")
    model(x).square().sum().backward()
    A, B = (tensor.detach().flatten(1) for tensor in variant.pair(layer))
    gA, gB = (None if t.grad is None else t.grad.flatten(1) for t in variant.pair(layer))
    if part == "core":
        dense = 2 * B @ variant.core_of(layer).grad @ A
    else:
        dense = 2 * (gB @ A + (0 if gA is None else B @ gA))
    left, right = direction(layer, "default", gradient_of)
    torch.testing.assert_close(2 * left @ right, dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient_row_norms(layer, "default"), dense.square().sum(1), rtol=1e-12, atol=1e-12)
    squared = variant.base_weight(layer).square().sum(1)
    torch.testing.assert_close(
        weight_row_norms(layer, "default", squared), dense_weight(layer).square().sum(1), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["linear", "conv", "pointwise", "conv1d"])
def test_noise_is_training_at_the_disturbed_weight(kind, monkeypatch):
    monkeypatch.setattr("adapters.learn.ggpo.BLOCK", 40)  # several row blocks
    model, layer, x = case(kind)
    noise = RowNoise(layer, "x", sigma=0.3, beta=1.0, run=5)
    variant.attach(layer).perturbation = noise
    noise.begin(layer, "default", step=2)
    E = torch.cat([rows for _, rows in noise_blocks(noise.deviations, noise.columns, noise.seed)])
    g = target(model, x)
    model.train()
    found = model(x)
    A, B = variant.pair(layer)
    grads = torch.autograd.grad((found * g).sum(), (x, A, B))
    weight = (dense_weight(layer) + E).detach().requires_grad_()
    wanted = dense_output(layer, x, weight)
    torch.testing.assert_close(found, wanted)
    gx, D = torch.autograd.grad((wanted * g).sum(), (x, weight))
    torch.testing.assert_close(grads[0], gx)
    torch.testing.assert_close(grads[1].flatten(1), B.flatten(1).T @ D)
    torch.testing.assert_close(grads[2].flatten(1), D @ A.flatten(1).T)
    model.eval()
    assert not torch.allclose(model(x), found)
    model.train()
    noise.end(layer, "default")
    assert torch.equal(model(x), model.eval()(x))


def test_noise_statistics_and_seeds():
    deviations = torch.tensor([0.1, 1.0, 3.0])
    E = torch.cat([rows for _, rows in noise_blocks(deviations, 4096, 9)])
    assert ((E.std(1) / deviations - 1).abs() < 0.03).all()
    again = torch.cat([rows for _, rows in noise_blocks(deviations, 4096, 9)])
    assert torch.equal(E, again)
    seeds = {noise_seed(run, step, name) for run in (0, 1) for step in (0, 1) for name in "ab"}
    assert len(seeds) == 8
    weight, gradient = torch.tensor([4.0, 9.0]), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(row_deviations(weight, gradient, 0.2, 5.0, 16), torch.tensor([0.15, 0.15]))
    torch.testing.assert_close(row_deviations(weight, None, 0.2, 5.0, 16), torch.tensor([0.1, 0.15]))
    mixed = row_deviations(weight, gradient, 0.2, 5.0, 16, "sd-scripts")
    torch.testing.assert_close(mixed, torch.tensor([0.4 + 5, 0.6]) / 2**0.5)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_momentum_branch_is_the_normalised_direction(kind, sign):
    model, layer, x = case(kind, alpha=6.0)
    A, B = variant.pair(layer)
    optimizer = torch.optim.AdamW([A, B], 1e-3)
    branch = MomentumBranch(rho=0.5, sign=sign)
    variant.attach(layer).perturbation = branch
    branch.begin(layer, "default", momentum_of(optimizer))
    assert branch.branch is None  # nothing to follow yet
    model(x).square().sum().backward()
    optimizer.step()
    size = 2 * torch.linalg.matrix_norm(dense_direction(layer, gradient_of))
    branch.end(layer, "default")
    branch.begin(layer, "default", momentum_of(optimizer))
    torch.testing.assert_close(torch.tensor(branch.memory).double(), size.double(), rtol=1e-5, atol=0)
    D = dense_direction(layer, lambda p: optimizer.state[p]["exp_avg"])
    k = min(1 / float(size), 10)
    E = sign * 0.5 * k * D / torch.linalg.matrix_norm(D)
    wanted = dense_output(layer, x, dense_weight(layer).detach() + E)
    model.train()
    torch.testing.assert_close(model(x), wanted)
    assert branch.adaptive == pytest.approx(k)
    gx = torch.autograd.grad(model(x).sum(), x)[0]
    torch.testing.assert_close(gx, torch.autograd.grad(wanted.sum(), x)[0])


def dense_direction(layer, change):
    left, right = direction(layer, "default", change)
    return left @ right


def test_momentum_of_strange_optimisers_is_refused():
    parameter = nn.Parameter(torch.ones(3, 3))
    parameter.grad = torch.ones(3, 3)
    adafactor = torch.optim.Adagrad([parameter])
    adafactor.step()
    with pytest.raises(InputError, match="Adagrad"):
        momentum_of(adafactor)(parameter)
    sgd = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    assert momentum_of(sgd)(parameter) is None
    sgd.step()
    assert torch.equal(momentum_of(sgd)(parameter), torch.ones(3, 3))


# ---------------------------------------------------------------- FFA


def two_layers():
    return get_peft_model(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), LoraConfig(r=2, target_modules=["0", "1"]))


def test_ffa_trains_b_only_and_averages_exactly():
    model = two_layers()
    freeze_a(model)
    start = {name: layer.A.clone() for name, layer in variant.read_layers(model).items()}
    clients = []
    for seed in range(3):
        with torch.no_grad():
            for layer in variant.adapted(model).values():
                variant.pair(layer)[1].zero_()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for step in range(3):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * seed + step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        clients.append(variant.read_layers(model))
    for name, A in start.items():
        assert all(torch.equal(client[name].A, A) for client in clients)
        average = sum(client[name].B.double() for client in clients) / 3 @ A.double()
        exact = sum(client[name].B.double() @ client[name].A.double() for client in clients) / 3
        torch.testing.assert_close(average, exact, rtol=1e-12, atol=1e-14)


def test_ffa_scale_only_rescales_the_learning_rate():
    """SGD: (s, eta) is (s', eta s^2 / s'^2) for the update s B A0 from B = 0."""

    def update(s: float, rate: float) -> torch.Tensor:
        g = torch.Generator().manual_seed(0)
        W0, A = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((4, 6), (2, 6)))
        x, y = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((9, 6), (9, 4)))
        B = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
        for _ in range(5):
            loss = (x @ (W0 + s * B @ A).T - y).square().mean()
            B = (B - rate * torch.autograd.grad(loss, B)[0]).detach().requires_grad_()
        return s * B @ A

    torch.testing.assert_close(update(1.0, 0.05), update(4.0, 0.05 / 16), rtol=1e-10, atol=1e-12)


def test_ffa_refuses_an_a_that_cannot_span():
    model = two_layers()
    with torch.no_grad():
        variant.pair(variant.adapted(model)["0"])[0][1] = 0
    with pytest.raises(InputError, match="full rank 2"):
        freeze_a(model)
