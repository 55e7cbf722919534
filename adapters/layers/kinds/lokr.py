"""LoKr (LyCORIS, arXiv 2309.14859): s W1 (x) W2, each of the two a full matrix or a low-rank product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapters.layers.products import (
    check_inner,
    check_size,
    hadamard_side,
    identity_pair,
    matrix,
    sizes,
    whole,
    with_kernel,
)
from adapters.layers.protocol import Factors

if TYPE_CHECKING:
    from torch import Tensor


class LoKr:
    """k1 or k1_a, k1_b; k2 or k2_a, k2_b, with kt (r, r, kh, kw) for convolutions."""

    name, order, beside = "LoKr", 40, False
    endings: Mapping[str, tuple[str, ...]] = {
        "k1": (".lokr_w1",), "k1_a": (".lokr_w1_a",), "k1_b": (".lokr_w1_b",),
        "k2": (".lokr_w2",), "k2_a": (".lokr_w2_a",), "k2_b": (".lokr_w2_b",), "kt": (".lokr_t2",),
    }  # fmt: skip

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        return None  # the product's rank is not the factors'

    def factors(self, parts: Mapping[str, Tensor]) -> Factors:
        import torch

        dim = 0
        if "k1" in parts:
            first = identity_pair(matrix(parts["k1"]))
        else:
            first = matrix(parts["k1_a"]), matrix(parts["k1_b"])
            dim = first[0].shape[1]
        kernel: tuple[int, ...] = ()
        if "k2" in parts:
            second_whole = parts["k2"].float()
            if second_whole.ndim not in (2, 4):
                raise ValueError("the second factor must be a matrix or a kernel")
            kernel = tuple(second_whole.shape[2:])
            second = identity_pair(second_whole.flatten(1))
        elif "kt" in parts:
            second, kernel = hadamard_side(parts["k2_a"], parts["k2_b"], parts["kt"])
            dim = parts["k2_b"].shape[0]
        else:
            second = matrix(parts["k2_a"]), matrix(parts["k2_b"])
            dim = second[0].shape[1]
        check_inner(first, second)
        (out1, in1), (out2, in2) = sizes(first), sizes(second)
        out, columns = out1 * out2, in1 * in2
        rank = first[0].shape[1] * second[0].shape[1]
        if rank >= min(out, columns):
            check_size(out, columns, min(out, columns))
            return whole(torch.kron(first[0] @ first[1], second[0] @ second[1]), kernel, dim)
        check_size(out, columns, rank)
        A = torch.kron(first[1].contiguous(), second[1].contiguous())
        return Factors(with_kernel(A, kernel), torch.kron(first[0].contiguous(), second[0].contiguous()), dim)


KIND = LoKr()
