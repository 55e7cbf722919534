"""GGPO, Flat-LoRA and MGPO against a slow loop written from the formulas: dense weights, AdamW by hand, no plugins."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call

from adapters.layers.variant import pair
from adapters.learn.ggpo import noise_blocks, noise_seed
from adapters.plugin import Handles, layers_of
from benchmarks import dialects
from benchmarks.plain_loop import Recipe, go_on, prepare

STEPS, RANK, ALPHA, RATE = 8, 6, 12, 6e-3
GGPO = {"perturb": "ggpo", "perturb_sigma": 0.2, "perturb_beta": 1.0}
MGPO = {"perturb": "mgpo", "perturb_rho": 0.05}
CASES = {
    "plain": {},
    "ggpo": GGPO,
    "ggpo, sd-scripts": GGPO | {"perturb_norm": "sd-scripts", "perturb_sigma": 0.5},
    "ggpo, cosine": GGPO | {"perturb_schedule": "cosine"},
    "flat": {"perturb": "flat", "perturb_sigma": 0.2},
    "mgpo": MGPO,
    "mgpo, uphill": MGPO | {"perturb_direction": "uphill"},
    "mgpo, ema 0.5, beta1 0.8": MGPO | {"perturb_ema": 0.5, "beta1": 0.8},
}


def data(number: int) -> torch.Tensor:
    everything = dialects.batch(dialects.NEW, 64, 1000, 0)
    return everything[torch.randperm(64, generator=torch.Generator().manual_seed(number))[:16]]


def unit_noise(name: str, step: int, shape: torch.Size) -> torch.Tensor:
    """The standard normal numbers that the layer's E is made of in this step."""
    rows = noise_blocks(torch.ones(shape[0], dtype=torch.float64), shape[1], noise_seed(0, step, name))
    return torch.cat([part for _, part in rows])


def disturbance(recipe: Recipe, layer: dict, step: int) -> torch.Tensor:
    """E of the specification, dense, for W' = W0 + s B A."""
    W, s, (rows, columns) = layer["W0"] + layer["s"] * layer["B"] @ layer["A"], layer["s"], layer["W0"].shape
    if recipe.perturb in ("ggpo", "flat"):
        beta = recipe.perturb_beta if recipe.perturb == "ggpo" else 0.0
        share = (1 - math.cos(math.pi * step / STEPS)) / 2 if recipe.perturb_schedule == "cosine" else 1.0
        sigma, w, g = share * recipe.perturb_sigma, W.norm(dim=1), layer["G"].norm(dim=1)
        if recipe.perturb_norm == "sqrt":
            deviation = sigma * (w**2 + beta * g**2).sqrt() / columns**0.5
        else:
            deviation = (sigma * w + beta * g**2) / rows**0.5
        return deviation[:, None] * unit_noise(layer["name"], step, W.shape)
    if recipe.perturb == "mgpo" and step > 0:
        D = s * (layer["mB"] @ layer["A"] + layer["B"] @ layer["mA"])
        k = min(1 / (layer["gbar"] + 1e-12), 10)
        sign = -1 if recipe.perturb_direction == "downhill" else 1
        return sign * recipe.perturb_rho * k * D / (D.norm() + 1e-12)
    return torch.zeros_like(W)


def slow(recipe: Recipe, layers: dict[str, dict]) -> list[float]:
    """Train ``layers`` (W0, A, B, s) in place; returns the losses."""
    base, losses = dialects.model().double(), []
    for layer in layers.values():
        layer.update(G=torch.zeros_like(layer["W0"]), gbar=None)
        for key in ("A", "B"):
            layer["m" + key], layer["v" + key] = torch.zeros_like(layer[key]), torch.zeros_like(layer[key])
    for step in range(STEPS):
        weights = {}
        for layer in layers.values():
            E = disturbance(recipe, layer, step)
            layer["A"].requires_grad_(), layer["B"].requires_grad_()
            weights[layer["path"] + ".weight"] = layer["W0"] + layer["s"] * layer["B"] @ layer["A"] + E
        ids = data(step)
        loss = functional_call(base, weights, (), {"input_ids": ids, "labels": ids}).loss
        leaves = [layer[key] for layer in layers.values() for key in ("A", "B")]
        grads = iter(torch.autograd.grad(loss, leaves))
        losses.append(float(loss.detach()))
        for layer in layers.values():
            g = {"A": next(grads), "B": next(grads)}
            A, B = layer["A"].detach(), layer["B"].detach()
            layer["G"] = layer["s"] * (g["B"] @ A + B @ g["A"])
            size, before, ema = float(layer["G"].norm()), layer["gbar"], recipe.perturb_ema
            layer["gbar"] = size if before is None else ema * before + (1 - ema) * size
            for key, old in (("A", A), ("B", B)):
                m = layer["m" + key] = recipe.beta1 * layer["m" + key] + (1 - recipe.beta1) * g[key]
                v = layer["v" + key] = 0.999 * layer["v" + key] + 0.001 * g[key] ** 2
                m, v = m / (1 - recipe.beta1 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                layer[key] = old - recipe.learning_rate * m / (v.sqrt() + 1e-8)
    return losses


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_a_run_is_the_slow_loop_from_the_formulas(values):
    torch.set_num_threads(1)
    recipe = Recipe(rank=RANK, alpha=ALPHA, learning_rate=RATE, steps=STEPS, **values)
    run = prepare(dialects.model().double(), recipe, data, dialects.TARGETS)
    adapted = layers_of(Handles({"model": run.model}))
    layers = {}
    for name, layer in adapted.items():
        A, B = (tensor.detach().clone() for tensor in pair(layer, "default"))
        path = name.removeprefix("model.")  # of the component
        W0 = layer.get_base_layer().weight.detach().clone()
        layers[name] = {"name": name, "path": path, "W0": W0, "A": A, "B": B, "s": ALPHA / RANK}
    go_on(run, recipe, data)
    assert slow(recipe, layers) == pytest.approx(run.losses, rel=1e-9)
    for name, layer in adapted.items():
        for key, tensor in zip("AB", pair(layer, "default"), strict=True):
            torch.testing.assert_close(tensor.detach(), layers[name][key], rtol=1e-6, atol=1e-9)
