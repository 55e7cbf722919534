"""Two kernels that read the factors page by page through their page numbers; mixed ranks, nothing padded or copied.

    shrink   one program per (token t, row j):  h_tj = <A_a[j], x_t>, over the p(in) pages of the row
    expand   one program per (token t, page q): y_t[q] += sum_j h_tj B_a[j, q]

They run on CUDA devices, and anywhere under Triton's interpreter (TRITON_INTERPRET=1 before it is imported).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from adapters.serving.dispatch import Group
    from adapters.serving.pool import PagePool


@triton.jit  # type: ignore[untyped-decorator]
def _shrink(x, pages, A, tokens, slot, h, inputs, rank, per_row, P: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    s, j = tl.program_id(0), tl.program_id(1)
    row = A + (tl.load(slot + s) * rank + j) * per_row
    token = tl.load(tokens + s)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for q in range(per_row):
        at = q * P + lane
        inside = (lane < P) & (at < inputs)
        weight = tl.load(pages + tl.load(row + q) * P + lane, mask=inside, other=0.0)
        value = tl.load(x + token * inputs + at, mask=inside, other=0.0)
        total += weight.to(tl.float32) * value.to(tl.float32)
    tl.store(h + s * rank + j, tl.sum(total, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _expand(h, pages, B, tokens, slot, y, outputs, rank, per_row, P: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    s, q = tl.program_id(0), tl.program_id(1)
    row = B + tl.load(slot + s) * rank * per_row + q
    lane = tl.arange(0, BLOCK)
    inside = (lane < P) & (q * P + lane < outputs)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in range(rank):
        weight = tl.load(pages + tl.load(row + j * per_row) * P + lane, mask=inside, other=0.0)
        total += tl.load(h + s * rank + j) * weight.to(tl.float32)
    place = y + tl.load(tokens + s) * outputs + q * P + lane
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


def add(x: Tensor, y: Tensor, group: Group, pool: PagePool) -> None:
    """y_t += B_a A_a x_t; h and the sums are kept in fp32."""
    count, rank, page = len(group.tokens), group.rank, pool.page_elems
    x = x.contiguous()
    h = torch.empty(count, rank, dtype=torch.float32, device=x.device)
    shape: dict[str, Any] = {"P": page, "BLOCK": triton.next_power_of_2(page)}
    wide, high = group.A.shape[1] // rank, group.B.shape[1] // rank
    _shrink[(count, rank)](x, pool.pages, group.A, group.tokens, group.slot, h, group.inputs, rank, wide, **shape)
    _expand[(count, high)](h, pool.pages, group.B, group.tokens, group.slot, y, group.outputs, rank, high, **shape)
