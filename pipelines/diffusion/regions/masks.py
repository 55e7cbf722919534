"""Regions on token grids: which cells belong to which region, at every resolution of the network.

With m_i the mask of region i on a grid of L = h w cells, the share of region i in a cell is

    share_i = m_i / max(1, sum_j m_j),      share of the background = 1 - sum_i share_i,

so shares sum to 1 everywhere. Where regions overlap they are averaged (in predictions, activations and attention
outputs); where a mask is soft the background has the rest. Masks are *soft* (area averages of the mask on the grid) or
*hard* (0 or 1; a box has the rows ceil(y0 h) to floor(y1 h), as in LoRA-Composer, a mask the cells that it covers at
least by half).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.errors import InputError
from pipelines.diffusion.regions.pictures import open_mask
from pipelines.diffusion.regions.region import Box, Region

ROUND = 1e-6
"""Edges this close to a cell border count as on it (thirds are not exact in binary)."""


@dataclass(frozen=True, eq=False)
class Place:
    """A region's place: a box, or a mask (height, width) in [0, 1] of any resolution."""

    box: Box | None
    mask: Tensor | None

    def soft(self, height: int, width: int) -> Tensor:
        """Share of every cell of a grid that is inside: (height, width) in [0, 1].

        The sides of a coarse grid must come from :func:`grids`: where halving rounded up, the last cells are smaller.
        """
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            return covered(y0, y1, height)[:, None] * covered(x0, x1, width)[None, :]
        assert self.mask is not None
        if edges(height) is None and edges(width) is None:
            return F.adaptive_avg_pool2d(self.mask[None, None], (height, width))[0, 0].clamp(0, 1)
        rows, columns = (averages(side, pixels) for side, pixels in zip((height, width), self.mask.shape, strict=True))
        return (rows @ self.mask.double() @ columns.T).float().clamp(0, 1)

    def hard(self, height: int, width: int) -> Tensor:
        """The cells of a grid that belong to the region: (height, width) of 0 and 1."""
        if self.box is None:
            return (self.soft(height, width) >= 0.5).float()
        x0, y0, x1, y1 = self.box
        rows, columns = cells(y0, y1, height), cells(x0, x1, width)
        made = torch.zeros(height, width)
        made[rows[0] : rows[1], columns[0] : columns[1]] = 1
        return made


class Side(int):
    """Number of cells along a side of a coarse grid, from halving ``finest`` cells ``halvings`` times, rounding up.

    A plain int is a side of equal cells.
    """

    finest: int
    halvings: int

    def __new__(cls, finest: int, halvings: int = 0) -> Side:
        side = super().__new__(cls, -(-finest // 2**halvings))
        side.finest, side.halvings = finest, halvings
        return side


def edges(count: int) -> list[int] | None:
    """Borders of the cells of a side, in cells of the finest grid; None if all cells are equally long."""
    if not isinstance(count, Side) or count.finest % 2**count.halvings == 0:
        return None
    return [min(cell * 2**count.halvings, count.finest) for cell in range(count + 1)]


def located(fraction: float, count: int) -> float:
    """A fraction of the picture's side, in cells: 2.5 is the middle of the third cell."""
    borders = edges(count)
    if borders is None:
        return fraction * count
    fine = fraction * borders[-1]
    cell = min(bisect_right(borders, fine), count) - 1
    return cell + (fine - borders[cell]) / (borders[cell + 1] - borders[cell])


def averages(count: int, pixels: int) -> Tensor:
    """Averaging weights (count, pixels): the share of each pixel in each cell of a side; rows sum to 1."""
    borders = torch.tensor(edges(count) or range(count + 1), dtype=torch.float64)
    borders = borders * (pixels / borders[-1])
    left = torch.arange(pixels, dtype=torch.float64)
    overlap = torch.minimum(borders[1:, None], left + 1) - torch.maximum(borders[:-1, None], left)
    overlap = overlap.clamp(min=0)
    return overlap / overlap.sum(1, keepdim=True)


def covered(start: float, end: float, count: int) -> Tensor:
    """Share of each cell of a side that the interval from ``start`` to ``end`` (fractions) covers: (count,)."""
    left = torch.arange(count, dtype=torch.float64)
    first, last = located(start, count), located(end, count)
    share = (torch.clamp(left + 1, max=last) - torch.clamp(left, min=first)).clamp(0, 1)
    share[share < ROUND] = 0
    share[share > 1 - ROUND] = 1
    return share.float()


def cells(start: float, end: float, count: int) -> tuple[int, int]:
    """First cell and end (exclusive) of the cells entirely between ``start`` and ``end`` (fractions)."""
    return math.ceil(located(start, count) - ROUND), math.floor(located(end, count) + ROUND)


def place(region: Region) -> Place:
    """The place of a region.

    Raises:
        InputError: its mask cannot be read, is empty, or is a tensor of the wrong shape or range.
    """
    if region.box is not None:
        return Place(region.box, None)
    if isinstance(region.mask, Tensor):
        mask = region.mask.detach().float().cpu()
        if (
            mask.ndim != 2
            or not bool(torch.isfinite(mask).all())
            or mask.min() < 0
            or mask.max() > 1
            or mask.max() == 0
        ):
            raise InputError(
                f"The mask of region '{region.title}' must be (height, width) in [0, 1] and not empty, "
                f"got shape {tuple(mask.shape)}."
            )
        return Place(None, mask)
    image: Any = open_mask(region.mask)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width)
    return Place(None, pixels.float() / 255)


def check_ratio(places: Sequence[Place], titles: Sequence[str], height: int, width: int) -> None:
    """Raise :class:`InputError` if a mask's aspect ratio is not the picture's."""
    for one, title in zip(places, titles, strict=True):
        if one.mask is None:
            continue
        rows, columns = one.mask.shape
        wanted = width / height
        # a mask may be rounded to whole pixels, so allow a difference of one
        if (
            not (columns - 1) / (rows + 1) <= wanted <= (columns + 1) / max(1, rows - 1)
            and columns * height != rows * width
        ):
            raise InputError(
                f"The mask of region '{title}' is {columns} x {rows} and the picture {width} x {height}: "
                "a mask must have the picture's aspect ratio."
            )


@dataclass(frozen=True, eq=False)
class Level:
    """The regions on one grid.

    ``shares`` (1 + N, L): row 0 is the background. The cells in which a row has a share are its *group*; groups are
    padded to equal length n, so that attention handles all in one call. ``index`` (G n,) is the cell of each slot,
    ``rows`` (G,) the row of each group. Back on the grid, cell l is the sum over m of
    ``weights[m, l] * slot[gather[m, l]]``.
    """

    height: int
    width: int
    shares: Tensor
    rows: tuple[int, ...]
    index: Tensor
    gather: Tensor
    weights: Tensor
    extra: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def slots(self) -> int:
        """Length n of a group."""
        return self.index.numel() // len(self.rows)

    @cached_property
    def slot_rows(self) -> Tensor:
        """The row of each slot (G n,)."""
        return torch.tensor(self.rows, device=self.index.device).repeat_interleave(self.slots)

    @cached_property
    def allowed(self) -> Tensor | None:
        """Which cell may attend to which (L, L); None if all may.

        Two cells that are both in regions but have none in common may not (the same as LoRA-Composer's mask for
        disjoint boxes, and defined for overlaps).
        """
        inside = self.shares[1:] > 0
        somewhere = inside.any(0)
        together = (inside.float().T @ inside.float()) > 0
        blocked = somewhere[:, None] & somewhere[None, :] & ~together
        return ~blocked if bool(blocked.any()) else None


def level(places: Sequence[Place], height: int, width: int, hard: bool, device: torch.device) -> Level:
    """The regions on a grid of ``height`` x ``width`` cells."""
    masks = [(one.hard if hard else one.soft)(height, width).flatten() for one in places]
    stacked = torch.stack(masks) if masks else torch.zeros(0, height * width)
    return level_of(stacked, height, width, device)


def level_of(masks: Tensor, height: int, width: int, device: torch.device) -> Level:
    """The level of masks (N, L) in [0, 1]."""
    shares = masks / masks.sum(0).clamp(min=1)
    rest = (1 - shares.sum(0)).clamp(min=0)
    rest[rest < ROUND] = 0
    shares = torch.cat([rest[None], shares])
    rows = [row for row in range(len(shares)) if bool((shares[row] > 0).any())]
    members = [shares[row].nonzero().flatten() for row in rows]
    length = max(len(member) for member in members)
    index = torch.cat([torch.cat([member, member[:1].expand(length - len(member))]) for member in members])
    overlap = int((shares > 0).sum(0).max())
    gather = torch.zeros(overlap, height * width, dtype=torch.long)
    weights = torch.zeros(overlap, height * width)
    filled = torch.zeros(height * width, dtype=torch.long)
    for group, (row, member) in enumerate(zip(rows, members, strict=True)):
        gather[filled[member], member] = group * length + torch.arange(len(member))
        weights[filled[member], member] = shares[row, member]
        filled[member] += 1
    return Level(height, width, shares.to(device), tuple(rows), index.to(device), gather.to(device), weights.to(device))


def grids(height: int, width: int) -> list[tuple[Side, Side]]:
    """The grids of a UNet on latents of this size, finest first; every downsampling halves and rounds up."""
    halvings = max(height - 1, width - 1).bit_length()
    return [(Side(height, level), Side(width, level)) for level in range(halvings + 1)]
