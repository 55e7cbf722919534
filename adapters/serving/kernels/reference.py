"""The low-rank product of each adapter by itself."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.serving.dispatch import Group
    from adapters.serving.pool import PagePool


def add(x: Tensor, y: Tensor, group: Group, pool: PagePool) -> None:
    """y_t += B_a A_a x_t."""
    ends = accumulate(group.lengths, initial=0)
    for number, (start, end) in enumerate(pairwise(ends)):
        A = pool.pages[group.A[number]].view(group.rank, -1)[:, : group.inputs]
        B = pool.pages[group.B[number]].view(group.rank, -1)[:, : group.outputs]
        rows = group.tokens[start:end]
        y[rows] += (x[rows].to(A) @ A.T @ B).to(y)
