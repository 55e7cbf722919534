"""Pairs (B, A) of factored layers, and the size limit that keeps damaged files from filling memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.layers.protocol import Factors

if TYPE_CHECKING:
    from torch import Tensor

    Pair = tuple[Tensor, Tensor]
    """B (out, r) and A (r, columns)."""

LIMIT = 2**27
"""Most values in one layer; real adapters stay far below, a damaged or hostile file may claim any size."""


def hadamard_side(w_a: Tensor, w_b: Tensor, core: Tensor | None) -> tuple[Pair, tuple[int, ...]]:
    """(B, A) and the kernel size; with a core, B A = sum_ij core[i, j] w_a[i, out] w_b[j, in]."""
    import torch

    a, b = matrix(w_a), matrix(w_b)
    if core is None:
        return (a, b), ()
    if core.ndim != 4:
        raise ValueError("a core must have four dimensions")
    check_size(a.shape[1], b.shape[1] * core.shape[2] * core.shape[3], core.shape[0])
    return (a.T, torch.einsum("jn,ijhw->inhw", b, core.float()).flatten(1)), tuple(core.shape[2:])


def whole(product: Tensor, kernel: tuple[int, ...], dim: int) -> Factors:
    """A full matrix as factors, one of them an identity."""
    B, A = identity_pair(product)
    return Factors(with_kernel(A, kernel), B, dim)


def identity_pair(product: Tensor) -> Pair:
    """(B, A) with B A = ``product``, one of them the identity of the smaller side."""
    import torch

    if 0 in product.shape:
        raise ValueError("a factor is empty")
    if product.shape[0] <= product.shape[1]:
        return torch.eye(product.shape[0]), product
    return product, torch.eye(product.shape[1])


def matrix(tensor: Tensor) -> Tensor:
    """A factor in fp32; raises ValueError unless it is a non-empty matrix."""
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError("a factor must be a matrix that is not empty")
    return tensor.float()


def with_kernel(A: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """A (r, in * kh * kw) as (r, in, kh, kw), where the kernel size is known."""
    return A.reshape(A.shape[0], -1, *kernel) if kernel else A


def sizes(pair: Pair) -> tuple[int, int]:
    """(out, columns)."""
    return pair[0].shape[0], pair[1].shape[1]


def check_inner(*pairs: Pair) -> None:
    """Raise ValueError if a pair does not multiply."""
    if any(B.shape[1] != A.shape[0] for B, A in pairs):
        raise ValueError("the inner sizes of a product must be equal")


def check_size(out: int, columns: int, rank: int) -> None:
    """Raise ValueError for an update larger than any model's."""
    if rank * (out + columns) > LIMIT:
        raise ValueError(f"an update of {out} x {columns} with rank {rank} is larger than any model's")
