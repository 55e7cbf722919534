"""ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws, arXiv 2410.09692.

    y = W0 x + B A x   (no factor s, no dropout)
    n_i = |(B A)_i|,   a_i = 1 / sqrt(n_i + 1 / eta^2)   per output row i
    gB = diag(a) D A^T,   gA = B^T diag(a) D,   gx = (W0 + B A)^T delta (unscaled),   D = sum over tokens of delta x^T

Rows that are still zero learn eta times faster, so B leaves zero quickly and then slows down. Autograd treats a as a
constant. n is computed from r x r Gram matrices, never from B A itself; in a layer with an offset it is the norm of
the change since the start. Trained: A and B. Stored: an ordinary LoRA with alpha = r.

The paper's formulas were reconstructed from secondary sources. Adam-like optimisers normalise gradients, so the rule is
for SGD; :class:`ScaledSteps` (our extension) scales the optimiser's update by a instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.layers.variant import attach, effective, offset_of, pair
from adapters.low_rank import row_norms_squared
from adapters.options import Option, Rule, Training
from adapters.plugin import Handles, Plugin, check_whole, matrices_of, no_decay

METHOD = Method(
    name="allora",
    title="ALLoRA",
    summary="Larger gradients for output rows still near zero; no scale and no dropout to choose; for SGD.",
    stage="learn",
    makes="ordinary LoRA",
    paper="ALLoRA, arXiv 2410.09692",
    entry="adapters.learn.allora:AlloraPlugin",
    training=Training(
        key="grad_rule",
        options=(
            Option(
                "allora_eta",
                2.0,
                gt=0,
                finite=True,
                help="allora: factor on the gradient of rows that are still zero.",
            ),
            Option(
                "allora_mode",
                "gradient",
                choices=("gradient", "lr"),
                help="allora: gradient is the paper's rule; lr scales the optimiser's update instead (ours, for "
                "AdamW).",
            ),
        ),
        refused=(
            Rule(
                "use_rslora or alpha not in (None, rank) or alpha_pattern or (rank_pattern and alpha is not None) "
                "or conv_alpha not in (None, conv_rank)",
                "ALLoRA has no scaling factor (its forward factor is 1): leave alpha empty and use_rslora off",
            ),
            Rule("dropout > 0", "ALLoRA replaces dropout: set dropout to 0"),
            Rule("use_dora", "ALLoRA's gradient rule is for plain low-rank layers: switch use_dora off"),
            Rule(
                "allora_mode == 'lr' and optimizer == 'schedulefree-adamw'",
                "allora_mode 'lr' scales each step of the weights, but schedule-free AdamW keeps two sets of them: "
                "choose another optimizer",
            ),
        ),
        warned=(
            Rule(
                "allora_mode == 'gradient' and optimizer in ('adamw', 'adamw8bit', 'adafactor', 'prodigy', "
                "'schedulefree-adamw')",
                "Adam-like optimisers normalise gradients, so ALLoRA's rule has almost no effect: use optimizer 'sgd', "
                "or allora_mode 'lr'.",
            ),
        ),
    ),
)


def row_factors(left: Tensor, right: Tensor, eta: float) -> Tensor:
    """a_i of the update left @ right, left (out, k), right (k, in): (out,), in fp32 or higher."""
    precise = torch.promote_types(left.dtype, torch.float32)
    n = row_norms_squared(left.to(precise), right.to(precise)).sqrt()
    return torch.rsqrt(n + eta**-2)


class AlloraRule:
    """A :class:`adapters.layers.variant.Rule`: the ordinary forward pass, parameter gradients scaled by row."""

    def __init__(self, eta: float = 2.0) -> None:
        self.eta = eta

    def __call__(self, layer: Any, adapter: str, x: Tensor) -> Tensor:
        A, B = pair(layer, adapter)
        module = layer.lora_A[adapter]
        offset = offset_of(layer, adapter)
        geometry = (module.stride, module.padding, module.dilation) if isinstance(module, nn.Conv2d) else None
        found: Tensor = _Scaled.apply(x, A, B, self.eta, geometry, offset)
        return found


class _Scaled(torch.autograd.Function):
    """B A x whose parameter gradients are scaled by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, eta: float, geometry: Any, offset: Any) -> Tensor:
        h = F.linear(x, A) if geometry is None else F.conv2d(x, A, None, *geometry)
        ctx.save_for_backward(x, h, A, B, *(offset or ()))
        ctx.eta, ctx.geometry = eta, geometry
        return F.linear(h, B) if geometry is None else F.conv2d(h, B)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, h, A, B, *offset = ctx.saved_tensors
        left, right = B.flatten(1), A.flatten(1)
        if offset:
            right, left = torch.cat([right, offset[0].flatten(1)]), torch.cat([left, -offset[1].flatten(1)], dim=1)
        a = row_factors(left, right, ctx.eta).to(g.dtype)
        x_, h_, A_, B_ = (tensor.to(g.dtype) for tensor in (x, h, A, B))
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        gx = gA = gB = None
        if ctx.geometry is None:
            scaled = g * a
            if need_x:
                gx = (g @ B_) @ A_
            if need_A:
                gA = (scaled @ B_).flatten(0, -2).T @ x_.flatten(0, -2)
            if need_B:
                gB = scaled.flatten(0, -2).T @ h_.flatten(0, -2)
        else:
            stride, padding, dilation = ctx.geometry
            scaled = g * a[:, None, None]
            up = B_.flatten(1).T[..., None, None]  # (r, out, 1, 1): backward through B
            if need_x:
                gx = conv2d_input(x_.shape, A_, F.conv2d(g, up), stride, padding, dilation)
            if need_A:
                gA = conv2d_weight(x_, A_.shape, F.conv2d(scaled, up), stride, padding, dilation)
            if need_B:
                gB = torch.einsum("bohw,brhw->or", scaled, h_)[..., None, None]
        return (
            None if gx is None else gx.to(x.dtype),
            None if gA is None else gA.to(A.dtype),
            None if gB is None else gB.to(B.dtype),
            None,
            None,
            None,
        )


class ScaledSteps:
    """Our extension for Adam-like optimisers: the optimiser's update is scaled instead of the gradients.

    B <- B_old + diag(a) (B_new - B_old), and A likewise with the mean of a.

    Args:
        layers: adapted PEFT layers by name.
        eta: factor of rows that are still zero.
    """

    def __init__(self, layers: Mapping[str, Any], eta: float, adapter: str = "default") -> None:
        self.layers, self.eta, self.adapter = list(layers.values()), eta, adapter
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []
        self._handles: list[Any] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale every step of ``optimizer`` from now on."""
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self.before()),
            optimizer.register_step_post_hook(lambda *_: self.after()),
        ]

    def detach(self) -> None:
        """Stop scaling the optimiser's steps."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def before(self) -> None:
        """Remember A, B and a."""
        self._before = []
        for layer in self.layers:
            A, B = pair(layer, self.adapter)
            a = row_factors(*effective(layer, self.adapter), self.eta)
            self._before.append((A.clone(), B.clone(), a))

    @torch.no_grad()
    def after(self) -> None:
        """Scale the change that the optimiser made."""
        for layer, (old_A, old_B, a) in zip(self.layers, self._before, strict=True):
            A, B = pair(layer, self.adapter)
            B.copy_(old_B + a.view(-1, *[1] * (B.ndim - 1)).to(B) * (B - old_B))
            if A.requires_grad:
                A.copy_(old_A + a.mean().to(A) * (A - old_A))


class AlloraPlugin(Plugin):
    """ALLoRA's gradient rule, or the same factors applied to the optimiser's steps."""

    name = "allora"

    def configure(self, config: Any) -> None:
        self.eta, self.mode = config.allora_eta, config.allora_mode

    def initialise(self, handles: Handles) -> None:
        self.layers, self.adapter = matrices_of(handles), handles.adapter
        for name, layer in self.layers.items():
            if layer.scaling[self.adapter] != 1:
                raise InputError(
                    f"ALLoRA has no scaling factor, but '{name}' has alpha / r = {layer.scaling[self.adapter]:g}: "
                    "leave alpha empty."
                )
            if self.mode == "gradient":
                attach(layer, self.adapter).rule = AlloraRule(self.eta)

    def after_inject(self, handles: Handles) -> None:
        check_whole(self.layers, self.adapter, "ALLoRA")
        no_decay(handles, [pair(layer, self.adapter)[1] for layer in self.layers.values()])
        if self.mode == "lr":
            if handles.optimizer is None:
                raise InputError("allora_mode 'lr' scales an optimiser's steps, but there is none.")
            ScaledSteps(self.layers, self.eta, self.adapter).attach(handles.optimizer)
