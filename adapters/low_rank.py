"""Algebra on low-rank products without forming them: L R with L (out, k) and R (k, in), k small.

Everything is computed in the dtype given; callers choose fp32 or fp64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""M x for a block of columns x."""


def row_norms_squared(left: Tensor, right: Tensor) -> Tensor:
    """|(L R)_i|^2 = L_i (R R^T) L_i^T, never below 0: (out,)."""
    return ((left @ (right @ right.T)) * left).sum(1).clamp_min(0)


def norm(left: Tensor, right: Tensor) -> Tensor:
    """|L R|_F, from the Gram matrices of both factors."""
    return ((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt()


def shifted_row_norms_squared(base: Tensor, left: Tensor, right: Tensor, base_squared: Tensor | None = None) -> Tensor:
    """|(W + L R)_i|^2 = |W_i|^2 + 2 <L_i, R W_i> + |(L R)_i|^2: (out,); ``base_squared`` is |W_i|^2, if known."""
    squared = base.square().sum(1) if base_squared is None else base_squared
    return (squared + 2 * ((base @ right.T) * left).sum(1) + row_norms_squared(left, right)).clamp_min(0)


def compact_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k,), Vh (k, in) of L R, by QR of both factors and an SVD of the (k, k) core."""
    q_left, core_left = torch.linalg.qr(left)
    q_right, core_right = torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(core_left @ core_right.T)
    k = S.numel()
    return q_left @ U[:, :k], S, Vh[:k] @ q_right.T


def truncated_svd(matrix: Tensor, rank: int, seed: int = 0, exact_below: int = 4096) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, rank), S (rank,), Vh (rank, in) of a dense matrix.

    Exact if the smaller side has at most ``exact_below`` entries; otherwise :func:`top_singular`.
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= exact_below:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    return top_singular(lambda x: matrix @ x, lambda y: matrix.T @ y, matrix, rank, seed)


def top_singular(
    forward: Product,
    backward: Product,
    like: Tensor,
    rank: int,
    seed: int = 0,
    steps: int = 10,
    tolerance: float = 1e-3,
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular triplets of an operator, by subspace iteration with a residual check.

    Args:
        forward: M x for x (in, q).
        backward: M^T y for y (out, q).
        like: a tensor of M's shape (out, in), dtype and device; its values are not used.
        rank: number of triplets; 16 more directions are iterated.
        seed: of the starting directions, drawn from a separate generator.
        steps: number of iterations.
        tolerance: largest |M v - s u| / s that counts as converged; otherwise the exact SVD of M is computed.

    Returns:
        U (out, rank), S (rank,) descending, Vh (rank, in).
    """
    rows, columns = like.shape
    rank = min(rank, rows, columns)
    width = min(rank + 16, rows, columns)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(columns, width, generator=generator, dtype=torch.float64).to(like)
    Q = torch.linalg.qr(forward(start))[0]
    for _ in range(steps):
        Q = torch.linalg.qr(forward(torch.linalg.qr(backward(Q))[0]))[0]
    core = backward(Q).T
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    U, S, Vh = (Q @ U)[:, :rank], S[:rank], Vh[:rank]
    residual = torch.linalg.vector_norm(forward(Vh.T) - U * S, dim=0)
    if bool((residual <= tolerance * S.clamp_min(torch.finfo(S.dtype).tiny)).all()):
        return U, S, Vh
    dense = forward(torch.eye(columns, dtype=like.dtype, device=like.device))
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]
