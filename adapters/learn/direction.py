"""The change of the full weight implied by changes of the adapter's parameters, as a low-rank product.

With W' = W0 + s (B A - B0 A0) and changes dA, dB (gradients, momenta): D = s (dB A + B dA), of rank at most 2r. With
A frozen, D = s dB A; in a layer with a core R, D = s B dR A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adapters.layers.variant import base_weight, core_of, effective, pair
from adapters.low_rank import row_norms_squared, shifted_row_norms_squared

Change = Callable[[Tensor], Tensor | None]
"""The change of a parameter (its gradient or momentum), or None while there is none."""


@torch.no_grad()
def direction(layer: Any, adapter: str, change: Change) -> tuple[Tensor, Tensor] | None:
    """(L, R) with D = s L R, L (out, k) and R (k, in * kernel), detached; None if no parameter has a change."""
    A, B = pair(layer, adapter)
    core = core_of(layer, adapter)
    down, up = A.detach().flatten(1), B.detach().flatten(1)
    if core is not None:
        moved = change(core)
        return None if moved is None else (up @ moved.detach().to(up), down)
    left, right = [], []
    moved_B, moved_A = change(B) if B.requires_grad else None, change(A) if A.requires_grad else None
    if moved_B is not None:
        left.append(moved_B.detach().flatten(1).to(up))
        right.append(down)
    if moved_A is not None:
        left.append(up)
        right.append(moved_A.detach().flatten(1).to(down))
    return (torch.cat(left, dim=1), torch.cat(right)) if left else None


def gradient_of(parameter: Tensor) -> Tensor | None:
    """A parameter's gradient, as a :data:`Change`."""
    return parameter.grad


@torch.no_grad()
def weight_row_norms(layer: Any, adapter: str, base_squared: Tensor) -> Tensor:
    """|W'_i|^2 of the current weight: (out,); ``base_squared`` is |W0_i|^2, computed once."""
    left, right = effective(layer, adapter)
    W0 = base_weight(layer).to(left)
    return shifted_row_norms_squared(W0, layer.scaling[adapter] * left, right, base_squared.to(left))


@torch.no_grad()
def gradient_row_norms(layer: Any, adapter: str) -> Tensor | None:
    """|G_i|^2 of the full weight's gradient, reconstructed from the adapter's: (out,), or None without gradients."""
    found = direction(layer, adapter, gradient_of)
    if found is None:
        return None
    left, right = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in found)
    return float(layer.scaling[adapter]) ** 2 * row_norms_squared(left, right)
