"""Three ways to compute LoRA experts, equal in forward and gradients.

With A (N, r, in), B (N, out, r) stacked:

- *stacked*: the ranks of all experts side by side, (x A^T * gates) B^T: two products of static shape, no sorting, any
  dtype; unused experts are computed and multiplied by 0;
- *sorted*: token-expert rows sorted by expert and one grouped product per factor (``grouped_mm``), which needs fp32 or
  16 bits and sizes that are multiples of 16 bytes; ranks are padded;
- *loop*: the same rows, expert by expert.

An expert without tokens gets gradients of 0, never None, in all three.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.layers.experts.gates import Gates, without_autocast

STACKED_UP_TO = 512
"""Sum of ranks up to which a linear layer's experts are computed stacked."""

RANKS = 8
"""Ranks are padded to multiples of this for the grouped product."""


@dataclass(frozen=True)
class Rows:
    """Token-expert pairs sorted by expert; S = T k of them.

    Attributes:
        token: (S,), the token of each row; ``expert``: (S,), its expert; ``gate``: (S, 1).
        ends: (N,) int32, where each expert's rows end.
        inverse: (S,), where the row of pair (token, i) is, token by token.
        tokens: T.
    """

    token: Tensor
    expert: Tensor
    gate: Tensor
    ends: Tensor
    inverse: Tensor
    tokens: int

    def gathered(self, x: Tensor) -> Tensor:
        """(S, in): the token x (T, in) of each row."""
        found: Tensor = _Gathered.apply(x, self)
        return found

    def combined(self, rows: Tensor) -> Tensor:
        """(T, out): the sum over each token's rows (S, out), each times its gate, in a fixed order."""
        found: Tensor = _Combined.apply(rows, self.gate.to(rows.dtype), self)
        return found


class _Gathered(torch.autograd.Function):
    """x[token]. Its gradient is the sum over each token's rows, which autograd's own would scatter into zeros."""

    @staticmethod
    def forward(context: Any, x: Tensor, rows: Rows) -> Tensor:
        context.rows = rows
        return x[rows.token]

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        ones = gradient.new_ones(gradient.shape[0], 1)
        return _Combined.apply(gradient, ones, context.rows), None


class _Combined(torch.autograd.Function):
    """The sum over each token's rows of gate x row; with gates of 1 the transpose of :class:`_Gathered`."""

    @staticmethod
    def forward(context: Any, x: Tensor, gate: Tensor, rows: Rows) -> Tensor:
        context.rows = rows
        context.save_for_backward(x, gate)
        gates = gate[rows.inverse].view(rows.tokens, 1, -1)
        with without_autocast(x):
            return torch.bmm(gates, x[rows.inverse].view(rows.tokens, -1, x.shape[1])).squeeze(1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        x, gate = context.saved_tensors
        each = _Gathered.apply(gradient, context.rows)
        of_gate = torch.linalg.vecdot(each, x)[:, None] if context.needs_input_grad[1] else None
        of_x = each * gate if torch.is_grad_enabled() else each.mul_(gate)
        return of_x, of_gate, None


def sort(gates: Gates) -> Rows:
    """The rows of some gates."""
    numbers = gates.numbers()
    tokens, k = numbers.shape
    flat = numbers.reshape(-1)
    order = flat.argsort(stable=True)
    counts = (flat[:, None] == torch.arange(gates.experts, device=flat.device)).sum(0)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return Rows(
        order // k, flat[order], gates.values.reshape(-1, 1)[order], counts.cumsum(0).to(torch.int32), inverse, tokens
    )


def grouped_fits(x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the grouped product takes these."""
    if not hasattr(F, "grouped_mm") or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if x.is_cuda and (torch.version.hip is not None or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return False
    step = 16 // x.element_size()
    return A.shape[2] % step == 0 and B.shape[1] % step == 0


def linear_path(asked: str, x: Tensor, A: Tensor, B: Tensor) -> str:
    """How the experts of a linear layer are computed."""
    few = A.shape[0] * A.shape[1] <= STACKED_UP_TO
    path = asked if asked != "auto" else "stacked" if few else "sorted"
    return "stacked" if path == "sorted" and not grouped_fits(x, A, B) else path


def block_path(asked: str, x: Tensor, *factors: tuple[Tensor, Tensor]) -> str:
    """How the experts of a feed-forward block are computed."""
    path = "sorted" if asked == "auto" else asked
    return "loop" if path == "sorted" and not all(grouped_fits(x, A, B) for A, B in factors) else path


def mixed(x: Tensor, A: Tensor, B: Tensor, gates: Gates, path: str, scale: float = 1.0) -> Tensor:
    """sum_e gate_e s B_e A_e x for each token: (T, out) for x (T, in)."""
    if gates.plain:
        return (x @ A[0].T * scale) @ B[0].T
    if path == "stacked":
        experts, rank, width = A.shape
        weights = gates.dense().to(x.dtype) * scale
        inner = (x @ A.reshape(-1, width).T).view(-1, experts, rank) * weights[..., None]
        return inner.flatten(1) @ B.transpose(1, 2).reshape(experts * rank, -1)
    rows = sort(gates)
    return rows.combined(by_expert(rows.gathered(x), A, B, rows, path, scale))


def by_expert(x: Tensor, A: Tensor, B: Tensor, rows: Rows, path: str, scale: float = 1.0) -> Tensor:
    """s B_e A_e x for each row x (S, in) with its own expert: (S, out). The scale goes to the r numbers between."""
    if A.shape[0] == 1 or x.is_meta:  # without values, for estimates: as many operations as sorted rows
        return (x @ A[0].T * scale) @ B[0].T
    if path == "sorted":
        spare = -A.shape[1] % RANKS
        A, B = F.pad(A, (0, 0, 0, spare)), F.pad(B, (0, spare))
        grouped: Any = F.grouped_mm
        inner = grouped(x, A.transpose(1, 2), offs=rows.ends) * scale
        return grouped(inner, B.transpose(1, 2), offs=rows.ends)
    if path == "stacked":
        experts, rank, width = A.shape
        own = F.one_hot(rows.expert, experts).to(x.dtype) * scale
        inner = (x @ A.reshape(-1, width).T).view(-1, experts, rank) * own[..., None]
        return inner.flatten(1) @ B.transpose(1, 2).reshape(experts * rank, -1)
    starts = [0, *rows.ends.tolist()]
    parts = [(x[start:end] @ A[e].T * scale) @ B[e].T for e, (start, end) in enumerate(pairwise(starts))]
    return torch.cat(parts)
