"""L4Q: Parameter Efficient Quantization-Aware Fine-Tuning on Large Language Models (arXiv 2402.04902).

The adapter is merged first, the merged weight is rounded to n bits with learned steps and offsets (LSQ, arXiv
1902.08153), and A, B, steps and offsets learn together. With groups of g inputs, step S and offset b per group:

    Wc = W0 + s B A;   w = (Wc - b) / S;   q = round(clamp(w, -2^(n-1), 2^(n-1) - 1));   Wq = q S + b;   y = Wq x

Gradients with G = dL/dWq, inside = (w is in range), straight through the rounding:

    dA = s B^T (G o inside);  dB = s (G o inside) A^T;  dS = sum_g G o (q - w if inside else clamp(w));
    db = sum_g G o (0 if inside else 1);  dx = dy Wq

The backward pass computes w and q again: nothing of the size of W0 is kept but W0 itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.compression.bits import pack, packed_bytes, unpack
from adapters.compression.packed_linear import PackedLinear
from adapters.errors import InputError

SMALLEST = 1e-8
"""Steps are kept at or above this: at zero or below, a group would be clipped to nothing."""

PARTS = ("codes", "step", "zero")
"""The tensors of a stored matrix."""

INT4_GROUPS = (32, 64, 128, 256)
"""Groups of torch's own int4 product."""


@dataclass(frozen=True)
class Grid:
    """Whole numbers of ``bits`` bits, one step and one offset for ``group`` inputs of an output."""

    bits: int
    group: int

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"L4Q weights have 2 to 8 bits, got {self.bits}.")
        if self.group < 1:
            raise InputError(f"A group holds at least one input, got {self.group}.")

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def check(self, inputs: int) -> None:
        """Raise :class:`InputError` unless the groups fill a row of ``inputs`` weights."""
        if inputs % self.group:
            able = [size for size in (256, 128, 64, 32, 16, 8) if inputs % size == 0]
            raise InputError(f"Groups of {self.group} do not fill its {inputs} inputs: use {able[0] if able else 1}.")

    def stored_bytes(self, out: int, inputs: int) -> int:
        """Bytes of a stored matrix."""
        return packed_bytes(out * inputs, self.bits) + 2 * 4 * out * (inputs // self.group)

    def __str__(self) -> str:
        return f"int{self.bits}-{self.group}"

    @classmethod
    def parse(cls, text: str) -> Grid:
        """The inverse of ``str``; raises :class:`InputError`."""
        bits, _, group = text.removeprefix("int").partition("-")
        if not (bits.isdigit() and group.isdigit()):
            raise InputError(f"'{text}' is not a grid of whole numbers such as int4-64.")
        return cls(int(bits), int(group))


@torch.no_grad()
def start(Wc: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Steps and offsets (out, in / g), fp32, with which no number of ``Wc`` (out, in) is clipped (L4Q's own start).

    Raises:
        InputError: groups that do not fill the rows, or numbers that are not finite.
    """
    grid.check(Wc.shape[1])
    groups = Wc.detach().float().view(Wc.shape[0], -1, grid.group)
    if not bool(groups.isfinite().all()):
        raise InputError("The weight holds numbers that are not finite.")
    step = torch.maximum((groups.amin(-1) / grid.low).abs(), (groups.amax(-1) / grid.high).abs())
    return step.clamp_min(SMALLEST), torch.zeros_like(step)


def scaled(Wc: Tensor, step: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """w (out, in / g, g)."""
    return (Wc.view(Wc.shape[0], -1, grid.group) - zero[..., None]) / step[..., None]


@torch.no_grad()
def codes_of(Wc: Tensor, step: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """q (out, in), whole numbers."""
    return scaled(Wc, step, zero, grid).clamp(grid.low, grid.high).round().view(Wc.shape)


def values_of(codes: Tensor, step: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Wq = q S + b (out, in)."""
    groups = codes.view(codes.shape[0], -1, grid.group)
    return (groups * step[..., None] + zero[..., None]).view(codes.shape)


def merged(W0: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Wc in fp32, or fp64 for fp64 weights."""
    precise = torch.promote_types(W0.dtype, torch.float32)
    return torch.addmm(W0.to(precise), B.to(precise), A.to(precise), alpha=scale)


class FakeQuantised(torch.autograd.Function):
    """y = Wq x; see the module's text.

    Args (of ``apply``): x (..., in); W0 (out, in), frozen; A (r, in); B (out, r); steps and offsets (out, in / g); s;
    the grid; the factor on the gradients of steps and offsets (LSQ: 1 / sqrt(g high)).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W0: Tensor, A: Tensor, B: Tensor, step: Tensor, zero: Tensor, s: float, grid: Grid,
        factor: float,
    ) -> Tensor:  # fmt: skip
        Wc = merged(W0, A, B, s)
        ctx.save_for_backward(x, W0, A, B, step, zero)
        ctx.s, ctx.grid, ctx.factor = s, grid, factor
        return F.linear(x, values_of(codes_of(Wc, step, zero, grid), step, zero, grid).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, W0, A, B, step, zero = ctx.saved_tensors
        grid: Grid = ctx.grid
        w = scaled(merged(W0, A, B, ctx.s), step, zero, grid)
        clamped = w.clamp(grid.low, grid.high)
        q = clamped.round()
        dx = dy @ values_of(q.view(W0.shape), step, zero, grid).to(dy.dtype) if ctx.needs_input_grad[0] else None
        precise = w.dtype
        G = (dy.reshape(-1, dy.shape[-1]).to(precise).T @ x.reshape(-1, x.shape[-1]).to(precise)).view(w.shape)
        inside = w == clamped
        d_step = (G * torch.where(inside, q - w, clamped)).sum(-1) * ctx.factor
        d_zero = (G * ~inside).sum(-1) * ctx.factor
        through = (G * inside).view(W0.shape)
        dA = ctx.s * (B.to(precise).T @ through)
        dB = ctx.s * (through @ A.to(precise).T)
        return dx, None, dA.to(A.dtype), dB.to(B.dtype), d_step.to(step.dtype), d_zero.to(zero.dtype), None, None, None


class IntegerLinear(PackedLinear):
    """y = Wq x + bias with q packed in n bits, steps and offsets in fp32.

    Args:
        parts: the tensors of :func:`integer_parts`.
        shape: (out, in).
    """

    EXACT = ("step", "zero")
    low_rank = None

    def __init__(self, parts: dict[str, Tensor], shape: tuple[int, int], grid: Grid, bias: Tensor | None = None):
        super().__init__(shape, {name: parts[name] for name in PARTS}, bias)
        self.grid = grid

    @property
    def stored_as(self) -> str:
        """For :func:`adapters.compression.storage.storage`."""
        return f"int{self.grid.bits}"

    @property
    def numbers(self) -> Tensor:
        """q (out, in)."""
        count = self.out_features * self.in_features
        found = unpack(self.qweight, self.grid.bits, count).float() + self.grid.low
        return found.view(self.out_features, self.in_features)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Wq (out, in)."""
        step: Any = self.step
        zero: Any = self.zero
        return values_of(self.numbers, step, zero, self.grid).to(dtype)

    def store(self, weight: Tensor) -> None:
        """Round ``weight`` (out, in) to the grid with its own steps and offsets."""
        step: Any = self.step
        zero: Any = self.zero
        self.codes = integer_parts(weight.float(), step, zero, self.grid)["codes"]


@torch.no_grad()
def integer_parts(Wc: Tensor, step: Tensor, zero: Tensor, grid: Grid) -> dict[str, Tensor]:
    """The tensors of a stored matrix: packed codes (uint8, q - low), steps and offsets (fp32).

    Raises:
        InputError: steps that are not positive and finite.
    """
    if not bool((step > 0).all() & step.isfinite().all() & zero.isfinite().all()):
        raise InputError("Steps must be positive and finite, and offsets finite: train with a smaller learning rate.")
    codes = codes_of(Wc, step, zero, grid) - grid.low
    return {"codes": pack(codes.flatten().long(), grid.bits), "step": step.float(), "zero": zero.float()}


# ------------------------------------------------------------------------------------------------ torch's int4 product


@torch.no_grad()
def to_torch_int4(layer: IntegerLinear) -> tuple[Tensor, Tensor]:
    """(packed, scales_and_zeros) for ``torch.ops.aten._weight_int4pack_mm_for_cpu``, which computes (u - 8) S + b.

    Raises:
        InputError: other than 4 bits, a group that the product does not know, or a size that it does not take.
    """
    if layer.grid.bits != 4 or layer.grid.group not in INT4_GROUPS:
        raise InputError(
            f"torch's int4 product takes 4 bits in groups of {', '.join(map(str, INT4_GROUPS))}, not {layer.grid}."
        )
    if layer.out_features % 16:
        raise InputError(f"torch's int4 product takes multiples of 16 outputs, not {layer.out_features}.")
    unsigned = (layer.numbers - layer.grid.low).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    step: Any = layer.step
    zero: Any = layer.zero
    return packed, torch.stack([step.T, zero.T], -1).contiguous()


def torch_int4(x: Tensor, packed: Tensor, group: int, scales_and_zeros: Tensor) -> Tensor:
    """x (n, in) times the weight of :func:`to_torch_int4`: (n, out)."""
    found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales_and_zeros.to(x.dtype))
    return found


@torch.no_grad()
def from_torch_int4(
    packed: Tensor, scales_and_zeros: Tensor, group: int, bias: Tensor | None = None
) -> IntegerLinear:  # fmt: skip
    """The layer of which :func:`to_torch_int4` made this: its weight is the product with the unit matrix."""
    grid = Grid(4, group)
    step, zero = (scales_and_zeros[..., number].T.contiguous().float() for number in (0, 1))
    inputs = step.shape[1] * group
    Wq = torch_int4(torch.eye(inputs), packed, group, scales_and_zeros.float()).T.contiguous()
    return IntegerLinear(integer_parts(Wq, step, zero, grid), (Wq.shape[0], inputs), grid, bias)
