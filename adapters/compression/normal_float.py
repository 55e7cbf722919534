"""NormalFloat with 2, 3, 4 or 8 bits and doubly quantised scales, as LQ-LoRA (arXiv 2311.12023) uses it.

A matrix, row by row, is cut into blocks of B0 numbers; B1 blocks are a super-block. With s the largest size in a block:

    offset = min of s over the matrix;  t = s - offset;  s1 = max of t over the super-block, kept in 16 or 32 bits
    t_q = round(t (2^b0 - 1) / s1);  s' = t_q s1 / (2^b0 - 1) + offset
    code = nearest of the 2^b values of the codebook to W / s';  W' = codebook[code] s'

which is b + b0 / B0 + b1 / (B0 B1) bits per weight, and one fp32 number per matrix. A matrix whose size is no multiple
of B0 B1 is filled up with its own first numbers; the bytes count them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from adapters.compression.bits import pack, packed_bytes, unpack
from adapters.compression.packed_linear import PackedLinear
from adapters.errors import InputError

OFFSET = 0.9677083
"""Probability at the outer values of the codebook."""

SCALES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Precisions of a super-block's scale."""

PARTS = ("codes", "scale_codes", "super_scales", "offset")
"""The tensors of a stored matrix."""


@dataclass(frozen=True, order=True)
class Configuration:
    """How one matrix is stored.

    Attributes:
        bits: b, of a weight: 2, 3, 4 or 8.
        scale_bits: b0, of a block's scale: 2, 3, 4 or 8.
        scale: precision of a super-block's scale, one of :data:`SCALES`.
        block: B0, weights that share a scale.
        blocks: B1, blocks that share a super-block's scale.
    """

    bits: int
    scale_bits: int = 8
    scale: str = "fp32"
    block: int = 64
    blocks: int = 256

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8) or self.scale_bits not in (2, 3, 4, 8):
            raise InputError(f"NormalFloat weights and scales have 2, 3, 4 or 8 bits, got {self.bits} and "
                             f"{self.scale_bits}.")  # fmt: skip
        if self.scale not in SCALES:
            raise InputError(f"Unknown precision '{self.scale}' of scales: use one of {', '.join(SCALES)}.")
        if self.block < 1 or self.blocks < 1:
            raise InputError("Blocks hold at least one weight, and super-blocks one block.")

    @property
    def bits_per_weight(self) -> float:
        """b + b0 / B0 + b1 / (B0 B1)."""
        own = 8 * SCALES[self.scale].itemsize
        return self.bits + self.scale_bits / self.block + own / (self.block * self.blocks)

    def divides(self, count: int) -> bool:
        """Whether ``count`` weights are whole super-blocks."""
        return count % (self.block * self.blocks) == 0

    def padded(self, count: int) -> int:
        """``count``, filled up to whole super-blocks."""
        whole = self.block * self.blocks
        return -(-count // whole) * whole

    def stored_bytes(self, count: int) -> int:
        """Bytes of a stored matrix of ``count`` weights."""
        full = self.padded(count)
        scales = packed_bytes(full // self.block, self.scale_bits)
        own = full // (self.block * self.blocks) * SCALES[self.scale].itemsize
        return packed_bytes(full, self.bits) + scales + own + 4

    def __str__(self) -> str:
        return f"nf{self.bits}-{self.scale_bits}-{self.scale}-{self.block}-{self.blocks}"

    @classmethod
    def parse(cls, text: str) -> Configuration:
        """The inverse of ``str``; raises :class:`InputError`."""
        parts = text.removeprefix("nf").split("-")
        try:
            bits, scale_bits, scale, block, blocks = parts
            return cls(int(bits), int(scale_bits), scale, int(block), int(blocks))
        except ValueError:
            raise InputError(f"'{text}' is not a NormalFloat configuration such as nf4-8-fp32-64-256.") from None


NF3, NF4 = Configuration(3), Configuration(4)
"""QLoRA's nested scales at 3 and 4 bits: 3.127 and 4.127 bits per weight."""


def every_configuration(thorough: bool = False) -> list[Configuration]:
    """The configurations to choose from: all 432 of the paper, or 48 of them that differ in what matters."""
    if thorough:
        bits: tuple[int, ...] = (2, 3, 4, 8)
        parts = itertools.product(bits, bits, SCALES, (16, 32, 64), (16, 64, 256))
    else:
        parts = itertools.product((2, 3, 4, 8), (4, 8), ("bf16",), (16, 32, 64), (16, 64))
    return [Configuration(*one) for one in parts]


@cache
def codebook(bits: int) -> Tensor:
    """The 2^bits values (fp32), ascending, from -1 to 1 with 0 among them: quantiles of the normal distribution."""
    half = 2 ** (bits - 1)
    left = torch.linspace(1 - OFFSET, 0.5, half, dtype=torch.float64)[:-1]
    right = torch.linspace(0.5, OFFSET, half + 1, dtype=torch.float64)
    values = torch.special.ndtri(torch.cat([left, right]))
    return (values / values[-1]).float()


def nearest(values: Tensor, bits: int) -> Tensor:
    """The code of the nearest value of the codebook; beyond -1 and 1, the outermost."""
    table = codebook(bits).to(values.device)
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2)


@dataclass(frozen=True)
class Stored:
    """A matrix in few bits.

    Attributes:
        codes: packed codes of the weights, uint8.
        scale_codes: packed t_q, uint8.
        super_scales: s1, one per super-block, in its own precision.
        offset: fp32, one number.
        shape: (out, in).
        how: the configuration.
    """

    codes: Tensor
    scale_codes: Tensor
    super_scales: Tensor
    offset: Tensor
    shape: tuple[int, int]
    how: Configuration

    def parts(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())


@torch.no_grad()
def quantise(W: Tensor, how: Configuration) -> Stored:
    """Store ``W`` (out, in); computed in fp32.

    Raises:
        InputError: it is no matrix, or holds numbers that are not finite.
    """
    if W.ndim != 2:
        raise InputError(f"Only matrices are stored as NormalFloat, not a tensor of shape {tuple(W.shape)}.")
    flat = W.detach().float().flatten()
    if not bool(flat.isfinite().all()):
        raise InputError("The weight holds numbers that are not finite.")
    codes, _, t_q, s1, offset = _coded(flat, how)
    return Stored(
        pack(codes.flatten(), how.bits), pack(t_q.flatten().long(), how.scale_bits), s1.flatten(), offset.view(1),
        (W.shape[0], W.shape[1]), how,
    )  # fmt: skip


@torch.no_grad()
def rounded(W: Tensor, how: Configuration) -> Tensor:
    """``dequantise(quantise(W, how))`` of a finite fp32 matrix, without packing."""
    codes, scales, *_ = _coded(W.flatten(), how)
    values = codebook(how.bits).to(W.device)[codes] * scales.view(-1, 1)
    return values.flatten()[: W.numel()].view(W.shape)


def _coded(flat: Tensor, how: Configuration) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes (blocks, B0), and what :func:`_scales` gives."""
    full = _filled(flat, how)
    scales, t_q, s1, offset = _scales(full, how)
    divisor = torch.where(scales > 0, scales, 1.0).view(-1, 1)
    return nearest(full.view(-1, how.block) / divisor, how.bits), scales, t_q, s1, offset


def _filled(flat: Tensor, how: Configuration) -> Tensor:
    missing = how.padded(flat.numel()) - flat.numel()
    if not missing:
        return flat
    times = -(-missing // flat.numel())
    return torch.cat([flat, flat.repeat(times)[:missing]])


def _scales(flat: Tensor, how: Configuration) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s' (blocks), t_q, s1 in its own precision, and the offset."""
    s0 = flat.view(-1, how.blocks, how.block).abs().amax(-1)
    offset = s0.min()
    t = s0 - offset
    s1 = t.amax(-1, keepdim=True).to(SCALES[how.scale])
    t_q = _scale_codes(t, s1.float(), how)
    return _blocks_scales(t_q, s1, offset, how), t_q, s1, offset


def _scale_codes(t: Tensor, s1: Tensor, how: Configuration) -> Tensor:
    steps = 2**how.scale_bits - 1
    return (t * steps / torch.where(s1 > 0, s1, 1.0)).round().clamp(0, steps)


def _blocks_scales(t_q: Tensor, s1: Tensor, offset: Tensor, how: Configuration) -> Tensor:
    return (t_q.float() * s1.float() / (2**how.scale_bits - 1) + offset).flatten()


@torch.no_grad()
def dequantise(stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
    """W' (out, in)."""
    how, count = stored.how, stored.shape[0] * stored.shape[1]
    full = how.padded(count)
    blocks = full // how.block
    t_q = unpack(stored.scale_codes, how.scale_bits, blocks).view(-1, how.blocks)
    scales = _blocks_scales(t_q, stored.super_scales.view(-1, 1), stored.offset, how)
    codes = unpack(stored.codes, how.bits, full)
    table = codebook(how.bits).to(codes.device)
    values = table[codes.int() if codes.dtype == torch.uint8 else codes].view(-1, how.block) * scales.view(-1, 1)
    return values.flatten()[:count].view(stored.shape).to(dtype)


class NormalFloatLinear(PackedLinear):
    """y = x (Q + s B A)^T + bias with Q stored as NormalFloat and a frozen low-rank part, if there is one.

    Attributes:
        low_rank: A (r, in) and B (out, r) of the frozen part with s = 1, or None.
    """

    EXACT = ("super_scales", "offset", "low_rank_A", "low_rank_B")

    def __init__(self, stored: Stored, bias: Tensor | None = None, low_rank: tuple[Tensor, Tensor] | None = None):
        A, B = low_rank or (None, None)
        super().__init__(stored.shape, {**stored.parts(), "low_rank_A": A, "low_rank_B": B}, bias)
        self.how = stored.how

    @property
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        A: Any = self.low_rank_A
        B: Any = self.low_rank_B
        return None if A is None or B is None else (A, B)

    @property
    def stored(self) -> Stored:
        """Q."""
        parts: dict[str, Any] = {name: getattr(self, name) for name in PARTS}
        return Stored(**parts, shape=(self.out_features, self.in_features), how=self.how)

    @property
    def stored_as(self) -> str:
        """For :func:`adapters.compression.storage.storage`."""
        return f"nf{self.how.bits}" + (" with a low-rank part" if self.low_rank else "")

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Q + s B A (out, in)."""
        Q = dequantise(self.stored, dtype)
        if self.low_rank is None:
            return Q
        A, B = self.low_rank
        return Q + (B.float() @ A.float()).to(dtype)

    def store(self, weight: Tensor) -> None:
        """Keep ``weight`` (out, in) instead of Q + s B A: the low-rank part stays, the rest is quantised again."""
        if self.low_rank is not None:
            A, B = self.low_rank
            weight = weight.float() - B.float() @ A.float()
        for name, part in quantise(weight, self.how).parts().items():
            setattr(self, name, part.to(weight.device))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, stored={self.how}"
