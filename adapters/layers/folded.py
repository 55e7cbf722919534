"""Adapters folded into the weights, while all samples, or all samples of a block, have the same gates.

    W' = W0 + sum_i g_i (d_i o W0 + B_i A_i)       (out, in[, kh, kw]);  d_i is DoRA's, B_i as the engine keeps it

    y = W' x + b                                   one W' for the whole batch
    y_k = W'_k x_k + b      k = 1..n               a batch of n equal blocks: one batched product with W' (n, out, in)

so that a module costs the same as without adapters. W0 is never written to: a folded module gets its own ``forward``
attribute, which hides its class's; removing it restores the module exactly.

The sum is computed in fp32 (fp64 for fp64 weights) and rounded once, to the precision of W0. In fp16 and bf16 that
rounding loses changes that are small relative to W0: such layers are left to the hook, which adds to the output.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Blocks = tuple[tuple[float, ...], ...]
"""Strength of every adapter in each of the n equal blocks of the batch."""

Forward = Callable[[Tensor], Tensor]

LOST = 0.2
"""|W' - sum| / |sum - W0| (Frobenius) above which 16 bits are too coarse for a change. At this value 0.2 % of its
strength is lost; for normally distributed weights it is a change of 0.8 % of W0 in bf16 and of 0.1 % in fp16."""


def foldable(module: nn.Module) -> bool:
    """Whether adapters can be folded into the module's weight.

    It must be an ordinary linear layer or convolution whose ``forward`` is not overridden and whose weight is neither
    quantised nor offloaded.
    """
    known = (nn.Linear.forward, nn.Conv2d.forward)
    if type(module).forward not in known or "forward" in vars(module):
        return False
    weight = module.weight
    plain = type(weight) is nn.Parameter and weight.dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    )  # fmt: skip
    if not plain or weight.is_meta:
        return False
    return not isinstance(module, nn.Conv2d) or (module.groups == 1 and module.padding_mode == "zeros")


def worth(blocks: int, x: Tensor, weight: Tensor) -> bool:
    """Whether one weight per block moves less memory than adapters beside the layer.

    A single weight always does. Each further weight is read once, whereas an adapter reads x once more and reads and
    writes y once more; with few positions per block (deep layers of small pictures) that is cheaper. The factor 2
    accounts for the small kernels that are saved.
    """
    positions = x.numel() // blocks // weight.shape[1]
    return blocks == 1 or 2 * positions * (weight.shape[1] + 2 * weight.shape[0]) >= weight.numel()


def total(weight: Tensor, A: Tensor, B: Tensor, gates: Tensor, rows: Tensor | None = None) -> Tensor | None:
    """W' of one block, or None if 16 bits are too coarse for it.

    Args:
        weight: W0 (out, in[, kh, kw]).
        A, B: (R, in[, kh, kw]) and (R, out), with the scales in B.
        gates: strength of each column (R,).
        rows: sum of g_i d_i of DoRA adapters (out,).
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    own = weight.flatten(1).to(wide)
    start = own if rows is None else own * (1 + rows.to(wide))[:, None]
    summed = torch.addmm(start, (B.to(wide) * gates.to(wide)[:, None]).T, A.flatten(1).to(wide))
    rounded = summed.to(weight.dtype)
    if rounded is not summed:
        lost = torch.linalg.vector_norm(rounded.to(wide) - summed)
        if bool(lost > LOST * torch.linalg.vector_norm(summed - own)):
            return None
    return rounded.view_as(weight)


def forward(module: nn.Module, weights: Sequence[Tensor]) -> Forward:
    """A forward function of the module with one of ``weights`` for each block of the batch (or one for all)."""
    bias: Any = module.bias
    if isinstance(module, nn.Conv2d):
        convolve = partial(F.conv2d, stride=module.stride, padding=module.padding, dilation=module.dilation)
        if len(weights) == 1:
            return partial(convolve, weight=weights[0], bias=bias)
        return partial(_convolutions, convolve, weights, bias)
    if len(weights) == 1:
        return partial(F.linear, weight=weights[0], bias=bias)
    return partial(_products, torch.stack(list(weights)).transpose(1, 2), bias)


def _convolutions(convolve: Callable[..., Tensor], weights: Sequence[Tensor], bias: Tensor | None, x: Tensor) -> Tensor:
    parts = zip(x.chunk(len(weights)), weights, strict=True)
    return torch.cat([convolve(part, weight=weight, bias=bias) for part, weight in parts])


def _products(weights: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x (n * b, ..., in) with weights (n, in, out)."""
    blocks = x.reshape(len(weights), -1, x.shape[-1])
    y = torch.bmm(blocks, weights) if bias is None else torch.baddbmm(bias, blocks, weights)
    return y.view(*x.shape[:-1], y.shape[-1])


class Overrides:
    """The modules whose ``forward`` is overridden."""

    def __init__(self) -> None:
        self._inside: dict[nn.Module, Forward] = {}

    def put(self, forwards: Mapping[nn.Module, Forward]) -> None:
        """Override the ``forward`` of these modules and of no others."""
        self.clear()
        self._inside = dict(forwards)
        for module, own in self._inside.items():
            vars(module)["forward"] = own

    def clear(self) -> None:
        """Restore every module, in one uninterruptible call."""
        deque(map(dict.pop, _attributes(self._inside), repeat("forward"), repeat(None)), maxlen=0)
        self._inside = {}


def _attributes(modules: Mapping[nn.Module, Any]) -> Iterator[dict[str, Any]]:
    return map(vars, modules)
