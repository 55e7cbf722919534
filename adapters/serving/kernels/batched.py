"""All adapters of a group at once: the pages of their factors are put side by side by one gather, then multiplied:

as many tokens per adapter (decoding)   h = X A^T, Y = h B as batched products, X (n, k, in)
different numbers (prompts)             the same as grouped products over the sorted rows, X (S, in)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.layers.experts.compute import grouped_fits

if TYPE_CHECKING:
    from adapters.serving.dispatch import Group
    from adapters.serving.pool import PagePool

FILL = 2
"""Segments are filled up to the longest one while that at most doubles the rows; beyond, the product is grouped."""


def add(x: Tensor, y: Tensor, group: Group, pool: PagePool) -> None:
    """y_t += B_a A_a x_t."""
    n, most = len(group.lengths), max(group.lengths)
    A = _rows(group.A, group.rank, group.inputs, pool)
    B = _rows(group.B, group.rank, group.outputs, pool)
    rows = x.index_select(0, group.tokens).to(A)
    if min(group.lengths) == most:
        update = torch.bmm(torch.bmm(rows.view(n, most, -1), A.transpose(1, 2)), B).view(len(rows), -1)
    elif n * most <= FILL * len(rows) or not grouped_fits(rows, A, B.transpose(1, 2)):
        update = _filled(rows, A, B, group.lengths)
    else:
        update = _grouped(rows, A, B, group.lengths)
    y.index_add_(0, group.tokens, update.to(y))


def _rows(ids: Tensor, rank: int, size: int, pool: PagePool) -> Tensor:
    """The factors of n adapters, (n, r, size)."""
    return pool.pages.index_select(0, ids.flatten()).view(ids.shape[0], rank, -1)[:, :, :size]


def _filled(rows: Tensor, A: Tensor, B: Tensor, lengths: tuple[int, ...]) -> Tensor:
    blocks = torch.nn.utils.rnn.pad_sequence(list(rows.split(lengths)), batch_first=True)
    made = torch.bmm(torch.bmm(blocks, A.transpose(1, 2)), B)
    return torch.cat([block[:length] for block, length in zip(made, lengths, strict=True)])


def _grouped(rows: Tensor, A: Tensor, B: Tensor, lengths: tuple[int, ...]) -> Tensor:
    ends = torch.tensor(lengths, device=rows.device).cumsum(0).to(torch.int32)
    h = F.grouped_mm(rows, A.transpose(1, 2), offs=ends)
    return F.grouped_mm(h, B, offs=ends)
