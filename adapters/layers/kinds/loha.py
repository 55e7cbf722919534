"""LoHa (FedPara, arXiv 2108.06098): s (B1 A1) o (B2 A2); for convolutions each product may have a core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapters.layers.products import check_inner, check_size, hadamard_side, sizes, whole, with_kernel
from adapters.layers.protocol import Factors

if TYPE_CHECKING:
    from torch import Tensor


class LoHa:
    """w1_a (out, r) and w1_b (r, in), w2_a and w2_b alike; with cores t1, t2 (r, r, kh, kw), w1_a and w2_a (r, out)."""

    name, order, beside = "LoHa", 30, False
    endings: Mapping[str, tuple[str, ...]] = {
        role: (f".hada_{role}",) for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    }

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        return None  # the product's rank is not the factors'

    def factors(self, parts: Mapping[str, Tensor]) -> Factors:
        first, kernel = hadamard_side(parts["w1_a"], parts["w1_b"], parts.get("t1"))
        second, other = hadamard_side(parts["w2_a"], parts["w2_b"], parts.get("t2"))
        if kernel != other or sizes(first) != sizes(second):
            raise ValueError("both products must have the same size")
        (B1, A1), (B2, A2) = first, second
        check_inner(first, second)
        dim = parts["w1_b"].shape[0]
        out, columns = sizes(first)
        rank = B1.shape[1] * B2.shape[1]
        if rank >= min(out, columns):
            check_size(out, columns, min(out, columns))
            return whole((B1 @ A1) * (B2 @ A2), kernel, dim)
        check_size(out, columns, rank)
        B = (B1[:, :, None] * B2[:, None, :]).flatten(1)
        A = (A1[:, None, :] * A2[None, :, :]).flatten(0, 1)
        return Factors(with_kernel(A, kernel), B, dim)


KIND = LoHa()
