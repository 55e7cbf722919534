"""Shared by plots: the frame with its numbers, points in it, and paths through them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Point = tuple[float, float]

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 72, 12, 14, 28


@dataclass(frozen=True)
class Axes:
    """The range shown: x from ``first`` to ``last``, y from ``low`` to ``high``."""

    first: float
    last: float
    low: float
    high: float

    def place(self, point: Point) -> Point:
        """A point in the drawing's units."""
        x = LEFT + (WIDTH - LEFT - RIGHT) * (point[0] - self.first) / (self.last - self.first)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (self.high - point[1]) / (self.high - self.low)
        return x, y

    def path(self, points: Iterable[Point]) -> str:
        """The ``d`` of a line through points; points above the frame are drawn on its edge."""
        return "M" + "L".join(f"{x:.1f} {max(TOP, y):.1f}" for x, y in map(self.place, points))

    def grid(self, whole: bool = False) -> str:
        """Grid lines and numbers; ``whole``: x is a whole number."""
        lines = []
        digits = decimals(self.high - self.low), 0 if whole else decimals(self.last - self.first)
        for part in range(5):
            value = self.high - (self.high - self.low) * part / 4
            y = self.place((self.first, value))[1]
            lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.{digits[0]}f}</text>')
        for part in range(5):
            at = self.first + (self.last - self.first) * part / 4
            anchor = "end" if part == 4 else "middle"
            x = self.place((at, self.low))[0]
            lines.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{at:.{digits[1]}f}</text>')
        return "".join(lines)


def decimals(span: float) -> int:
    """Decimals needed to tell apart the numbers along an axis of this length."""
    return min(4, max(0, math.floor(-math.log10(span / 4)) + 2))


def room(values: Sequence[float], share: float = 0.98) -> tuple[float, float]:
    """Lowest and highest number of an axis for ``values``; the largest few may lie outside."""
    ordered = sorted(values)
    high = ordered[min(len(ordered) - 1, math.ceil(len(ordered) * share))]
    low = ordered[0]
    free = (high - low) * 0.08 or abs(high) * 0.1 or 0.1
    return max(0.0, low - free) if low >= 0 else low - free, high + free
