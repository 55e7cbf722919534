"""LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation Optimization, arXiv
2502.14538v1, and Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape, arXiv 2409.14396.

Forward and backward at W' + E, the step at W', with W' = W0 + s B A and G its gradient in the previous step:

    GGPO   std_i = sigma sqrt(|W'_i|^2 + beta |G_i|^2) / sqrt(in),   E_ij ~ N(0, std_i^2)
    Flat   std_i = sigma |W'_i| / sqrt(in)

One E per optimiser step, drawn block by block of rows from a seed of (run, step, layer): it is never stored, gradient
checkpointing recomputes with the same E, and W0 is never written to. Later versions of the paper describe another
method (:mod:`adapters.learn.mgpo`); this formula was reconstructed from ports of the first version, one of which is
``mix="sd-scripts"``: (sigma |W'_i| + beta |G_i|^2) / sqrt(out). Trained: A and B. Stored: an ordinary LoRA.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.layers.variant import base_weight
from adapters.learn.direction import gradient_row_norms, weight_row_norms
from adapters.learn.perturbation import PerturbationPlugin
from adapters.options import Option, Rule, Training
from adapters.plugin import Handles

SIGMA = Option(
    "perturb_sigma",
    0.03,
    gt=0,
    finite=True,
    help="ggpo, flat: noise relative to the norm of the weight's rows (0.03 is mild, 0.2 strong).",
)
SCHEDULE = Option(
    "perturb_schedule",
    "constant",
    choices=("constant", "cosine"),
    help="ggpo, flat: constant noise, or growing from zero to full over the run.",
)
NORM = Option(
    "perturb_norm",
    "sqrt",
    choices=("sqrt", "sd-scripts"),
    help="ggpo, flat: how weight and gradient norms are combined (sqrt, or as in kohya's sd-scripts).",
)
STRONG = Rule(
    "perturb_sigma >= 0.5",
    "Noise of half the weight's size or more usually destroys the model: use 0.03 to 0.2.",
)

METHODS = (
    Method(
        name="ggpo",
        title="LoRA-GGPO",
        summary="Trains at randomly perturbed weights, more strongly where weights and gradients are large: flatter "
        "minima, smoother loss at high rank.",
        stage="learn",
        makes="ordinary LoRA",
        paper="LoRA-GGPO, arXiv 2502.14538v1",
        entry="adapters.learn.ggpo:GuidedNoisePlugin",
        training=Training(
            key="perturb",
            shared=("perturb_every",),
            options=(
                SIGMA,
                Option("perturb_beta", 0.01, ge=0, finite=True, help="ggpo: weight of the gradients in the noise."),
                NORM,
                SCHEDULE,
            ),
            warned=(STRONG,),
        ),
    ),
    Method(
        name="flat",
        title="Flat-LoRA",
        summary="Trains at randomly perturbed weights, in proportion to the norm of their rows: flatter minima.",
        stage="learn",
        makes="ordinary LoRA",
        paper="Flat-LoRA, arXiv 2409.14396",
        entry="adapters.learn.ggpo:NoisePlugin",
        training=Training(key="perturb", shared=("perturb_every",), options=(SIGMA, NORM, SCHEDULE), warned=(STRONG,)),
    ),
)

BLOCK = 1 << 22
"""Most entries of E in memory at once."""


def row_deviations(
    weight: Tensor, gradient: Tensor | None, sigma: float, beta: float, columns: int, mix: str = "sqrt"
) -> Tensor:
    """std (out,) from |W'_i|^2 and |G_i|^2 (None in the first step) of a layer with ``columns`` inputs."""
    if gradient is None:
        gradient = torch.zeros_like(weight)
    if mix == "sd-scripts":
        return (sigma * weight.sqrt() + beta * gradient) / weight.numel() ** 0.5
    return sigma * (weight + beta * gradient).sqrt() / columns**0.5


def noise_seed(run: int, step: int, layer: str) -> int:
    """The seed of one layer's E in one step."""
    digest = hashlib.blake2b(f"{run}/{step}/{layer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def noise_blocks(deviations: Tensor, columns: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """E (out, columns) in blocks (first row, rows); the same for the same seed."""
    rows = max(1, BLOCK // columns)
    for number, first in enumerate(range(0, deviations.numel(), rows)):
        part = deviations[first : first + rows]
        generator = torch.Generator(deviations.device).manual_seed(seed + number)
        noise = torch.randn(part.numel(), columns, generator=generator, device=part.device, dtype=part.dtype)
        yield first, noise * part[:, None]


class RowNoise:
    """The perturbation of one layer (:class:`adapters.layers.variant.Perturbation`), off until :meth:`begin`.

    Args:
        name: of the layer, part of its seed.
        beta: weight of the gradients; 0 is Flat-LoRA.
    """

    def __init__(self, layer: Any, name: str, sigma: float, beta: float, mix: str = "sqrt", run: int = 0) -> None:
        self.name, self.sigma, self.beta, self.mix, self.run = name, sigma, beta, mix, run
        W0 = base_weight(layer)
        self.base_squared = W0.to(torch.promote_types(W0.dtype, torch.float32)).square().sum(1)
        self.columns = W0.shape[1]
        self.memory: Tensor | None = None  # |G_i|^2 of the previous step
        self.deviations: Tensor | None = None
        self.seed = 0

    def begin(self, layer: Any, adapter: str, step: int, strength: float = 1.0) -> None:
        """Set E for an optimiser step; ``strength`` multiplies sigma (schedules)."""
        weight = weight_row_norms(layer, adapter, self.base_squared)
        gradient = None if self.memory is None else self.memory.to(weight)
        self.deviations = row_deviations(weight, gradient, strength * self.sigma, self.beta, self.columns, self.mix)
        self.seed = noise_seed(self.run, step, self.name)

    def end(self, layer: Any, adapter: str) -> None:
        """Switch off and keep the gradients' row norms for the next step."""
        self.deviations = None
        if self.beta:
            self.memory = gradient_row_norms(layer, adapter)

    def __call__(self, layer: Any, adapter: str, x: Tensor) -> Tensor | None:
        if self.deviations is None:
            return None
        module = layer.lora_A[adapter]
        geometry: Any = None
        shape: Any = ()
        if isinstance(module, nn.Conv2d):
            geometry, shape = (module.stride, module.padding, module.dilation), module.weight.shape[1:]
        found: Tensor = _Noise.apply(x, self.deviations, self.columns, self.seed, geometry, shape)
        return found


class _Noise(torch.autograd.Function):
    """E x, and E^T times the output's gradient in the backward pass, where E is drawn again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, deviations: Tensor, columns: int, seed: int, geometry: Any, shape: Any) -> Tensor:
        ctx.save_for_backward(deviations)
        ctx.columns, ctx.seed, ctx.geometry, ctx.shape = columns, seed, geometry, shape
        ctx.like = x.shape, x.dtype
        parts = []
        for _, E in noise_blocks(deviations, columns, seed):
            E = E.to(x.dtype)
            parts.append(F.linear(x, E) if geometry is None else F.conv2d(x, E.reshape(-1, *shape), None, *geometry))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1 if geometry is None else 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None
        (g,) = grads
        (deviations,) = ctx.saved_tensors
        size, dtype = ctx.like
        total: Any = 0
        for first, E in noise_blocks(deviations, ctx.columns, ctx.seed):
            E, rows = E.to(g.dtype), slice(first, first + E.shape[0])
            if ctx.geometry is None:
                total = total + g[..., rows] @ E
            else:
                stride, padding, dilation = ctx.geometry
                total = total + conv2d_input(size, E.reshape(-1, *ctx.shape), g[:, rows], stride, padding, dilation)
        return total.to(dtype), None, None, None, None, None


class NoisePlugin(PerturbationPlugin):
    """Flat-LoRA: every layer perturbed by noise in proportion to the norm of its rows."""

    active: dict[str, RowNoise]
    beta = 0.0

    def configure(self, config: Any) -> None:
        super().configure(config)
        self.sigma, self.mix, self.schedule = config.perturb_sigma, config.perturb_norm, config.perturb_schedule

    def after_inject(self, handles: Handles) -> None:
        self.steps = handles.steps
        if self.schedule == "cosine" and self.steps < 1:
            raise InputError("perturb_schedule 'cosine' needs the number of steps: set max_steps, or use 'constant'.")
        super().after_inject(handles)

    def make(self, name: str, layer: Any, handles: Handles) -> RowNoise:
        return RowNoise(layer, name, self.sigma, self.beta, self.mix, handles.seed)

    def begin(self, name: str, layer: Any, step: int) -> None:
        strength = 1.0
        if self.schedule == "cosine":
            strength = (1 - math.cos(math.pi * min(1.0, step / self.steps))) / 2
        if strength > 0:
            self.active[name].begin(layer, self.adapter, step, strength)


class GuidedNoisePlugin(NoisePlugin):
    """LoRA-GGPO: the noise also follows the gradients of the previous step."""

    def configure(self, config: Any) -> None:
        super().configure(config)
        self.beta = config.perturb_beta
