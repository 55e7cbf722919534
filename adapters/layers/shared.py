"""Sparsely Shared LoRA on Whisper for Child Speech Recognition (S2-LoRA), arXiv 2309.11756.

    y = W0 x + B_g (v_m * (A_g x)),   D_m = B_g diag(v_m) A_g,   A_g (r, in), B_g (out, r), v_m (r,)

One pair A_g, B_g belongs to a whole group g of weights, and each weight m owns only the coefficients v_m, of which an
L1 penalty leaves few. The paper's abstract calls the pair "globally shared" and does not say how weights of different
shapes share one; :func:`groups` offers several rules, none of which we can call the paper's. With "blocks", weights are
cut into blocks of one shape (d, d), D_m[i, j] = B diag(v_m[i, j]) A, so that v_m is (rows, columns, r) in general and
(1, 1, r) for an uncut weight.

Exact as an ordinary LoRA without an SVD: with the support K of v_m,

    lora_A = sqrt|v_K| A_K,   lora_B = B_K sign(v_K) sqrt|v_K|,   r_m = alpha_m = |K|

The pair lives in one module that the layers only point to, so that it moves, is copied and is optimised once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from adapters.errors import InputError

Share = Literal["shape", "type", "type+stack", "blocks"]
"""What shares a pair: weights of one shape; of one kind (q_proj, fc1 ...); of one kind within the encoder or the
decoder; or all weights, cut into blocks of one shape."""

Size = tuple[int, int]
"""(out, in)."""


@dataclass(frozen=True)
class Group:
    """Weights that share a pair.

    Attributes:
        size: (out, in) of the pair, B (out, r) and A (r, in).
        members: module -> (rows, columns) of blocks that its weight is cut into; (1, 1) is uncut.
    """

    size: Size
    members: Mapping[str, tuple[int, int]]


def groups(sizes: Mapping[str, Size], share: Share) -> dict[str, Group]:
    """The groups by name.

    Args:
        sizes: module path -> (out, in) of its weight.

    Raises:
        InputError: no module, kinds with several shapes, or shapes that cannot be cut into equal blocks.
    """
    if not sizes:
        raise InputError("No module shares anything: choose layers with targets or target_regex.")
    if share == "blocks":
        return _blocks(sizes)
    found: dict[str, dict[str, Size]] = {}
    for name, size in sizes.items():
        found.setdefault(_group_of(name, size, share), {})[name] = size
    for group, members in found.items():
        if len(shapes := sorted(set(members.values()))) > 1:
            told = " and ".join(f"{out} x {inputs}" for out, inputs in shapes[:2])
            raise InputError(
                f"The layers '{group}' have several shapes ({told}) and cannot share a pair: set s2_share to 'shape'."
            )
    return {
        group: Group(next(iter(members.values())), dict.fromkeys(members, (1, 1))) for group, members in found.items()
    }


def _group_of(name: str, size: Size, share: Share) -> str:
    kind = name.rpartition(".")[2]
    if share == "shape":
        return f"{size[0]}x{size[1]}"
    if share == "type":
        return kind
    stack = re.split(r"\.\w+\.\d+\.", name, maxsplit=1)[0] if re.search(r"\.\d+\.", name) else ""
    return f"{stack}.{kind}" if stack else kind


def _blocks(sizes: Mapping[str, Size]) -> dict[str, Group]:
    d = min(min(size) for size in sizes.values())
    for name, (out, inputs) in sizes.items():
        if out % d or inputs % d:
            raise InputError(
                f"The layer '{name}' ({out} x {inputs}) cannot be cut into blocks of {d} x {d}: set s2_share to "
                "'shape', or leave it out with exclude_regex."
            )
    return {"blocks": Group((d, d), {name: (out // d, inputs // d) for name, (out, inputs) in sizes.items()})}


def parameters(found: Mapping[str, Group], rank: int) -> int:
    """Trained numbers: r (out + in) per group, and r per block of every member."""
    pairs = sum(rank * sum(group.size) for group in found.values())
    return pairs + rank * sum(rows * columns for group in found.values() for rows, columns in group.members.values())


# ------------------------------------------------------------------------------------------------ algebra


def product(x: Tensor, A: Tensor, B: Tensor, v: Tensor) -> Tensor:
    """D x for x (..., columns * in): (..., rows * out), with v (rows, columns, r)."""
    rows, columns, _ = v.shape
    hidden = x.unflatten(-1, (columns, -1)) @ A.T
    if rows == columns == 1:
        weighted = hidden * v[0]
    else:
        weighted = (hidden.unsqueeze(-3) * v).sum(-2)
    return (weighted @ B.T).flatten(-2)


def delta(A: Tensor, B: Tensor, v: Tensor) -> Tensor:
    """D (rows * out, columns * in), dense."""
    rows, columns, _ = v.shape
    blocks = [torch.cat([(B * v[i, j]) @ A for j in range(columns)], dim=1) for i in range(rows)]
    return torch.cat(blocks)


def as_lora(A: Tensor, B: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(lora_A, lora_B) with lora_B lora_A = D exactly; rank |K| for an uncut weight, 0 where every v is 0.

    A cut weight has one component per rank and per block row (or per block column, whichever are fewer).
    """
    rows, columns, rank = v.shape
    across = rows >= columns  # one component per block column j: b_k stacked over the rows
    components = v.permute(1, 2, 0) if across else v.permute(0, 2, 1)  # (outer, r, inner)
    outer, inner = components.shape[0], components.shape[2]
    norm = torch.linalg.vector_norm(components, dim=-1)  # (outer, r)
    kept = norm.flatten() > 0
    root = norm.sqrt()
    share = components / root.clamp_min(torch.finfo(v.dtype).tiny).unsqueeze(-1)  # (outer, r, inner)
    placed = torch.eye(outer, dtype=v.dtype, device=v.device)
    long, short = (B.T, A) if across else (A, B.T)  # (r, n) each
    spread = (share.unsqueeze(-1) * long[:, None, :]).reshape(outer * rank, inner * long.shape[1])
    single = (root[..., None] * short)[:, :, None, :] * placed[:, None, :, None]  # (outer, r, outer, n)
    single = single.reshape(outer * rank, outer * short.shape[1])
    down, up = (single, spread) if across else (spread, single)
    return down[kept].contiguous(), up[kept].T.contiguous()


def deviation(A: Tensor, B: Tensor) -> Tensor:
    """|A A^T - I|_F^2 + |B^T B - I|_F^2, which keeps the pair's size, and with it the meaning of |v|, fixed."""
    unit = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
    return (A @ A.T - unit).square().sum() + (B.T @ B - unit).square().sum()


def soft_threshold(v: Tensor, amount: float) -> Tensor:
    """sign(v) max(|v| - amount, 0), the proximal step of amount * |v|_1: small coefficients become exactly 0."""
    return v.sign() * (v.abs() - amount).clamp_min(0)


@torch.no_grad()
def renormalise(A: Tensor, B: Tensor, coefficients: Iterable[Tensor]) -> None:
    """Give rows of A and columns of B norm 1, in place, their norms going into every v: each D stays what it was."""
    norms = []
    for matrix, dim in ((A, 1), (B, 0)):
        norm = torch.linalg.vector_norm(matrix, dim=dim)
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        matrix.div_(norm.unsqueeze(dim))
        norms.append(norm)
    for v in coefficients:
        v.mul_(norms[0] * norms[1])


def orthonormal(size: Size, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (r, in) with orthonormal rows and B (out, r) with orthonormal columns, by QR of Gaussian matrices.

    Raises:
        InputError: a rank for which there are none.
    """
    check_rank(size, rank)
    out, inputs = size
    A = torch.linalg.qr(torch.randn(inputs, rank, generator=generator)).Q.T
    return A.contiguous(), torch.linalg.qr(torch.randn(out, rank, generator=generator)).Q.contiguous()


def gaussian(size: Size, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B from N(0, 0.02^2), as AdaLoRA starts; the deviation then pulls them to orthonormal."""
    check_rank(size, rank)
    A = 0.02 * torch.randn(rank, size[1], generator=generator)
    return A, 0.02 * torch.randn(size[0], rank, generator=generator)


def check_rank(size: Size, rank: int) -> None:
    """Raise :class:`InputError` unless 1 <= rank <= min(out, in)."""
    if not 1 <= rank <= min(size):
        raise InputError(
            f"Rank {rank} cannot be shared by weights of {size[0]} x {size[1]}: use 1 to {min(size)}, or leave them "
            "out with exclude_regex."
        )


# ------------------------------------------------------------------------------------------------ modules


class SharedPair(nn.Module):
    """The one owner of a group's A (r, in) and B (out, r)."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)


class Shares(nn.Module):
    """What one layer owns: v (rows, columns, r), and a pointer to the pair, which is not registered here."""

    def __init__(self, pair: SharedPair, v: Tensor) -> None:
        super().__init__()
        self.v = nn.Parameter(v)
        self._pair = (pair,)

    @property
    def pair(self) -> SharedPair:
        return self._pair[0]

    def forward(self, x: Tensor) -> Tensor:
        """D x."""
        return product(x, self.pair.A, self.pair.B, self.v)

    @torch.no_grad()
    def as_lora(self) -> tuple[Tensor, Tensor]:
        """As :func:`as_lora`, detached, in fp32 or a higher dtype."""
        A, B, v = (t.detach() if t.dtype == torch.float64 else t.detach().float() for t in self.factors)
        return as_lora(A, B, v)

    @property
    def factors(self) -> Sequence[Tensor]:
        """A, B and v."""
        return self.pair.A, self.pair.B, self.v
