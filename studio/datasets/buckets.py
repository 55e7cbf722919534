"""Aspect-ratio buckets: pictures keep their shape, and those of one batch share a size.

All sizes are ``(width, height)`` in pixels. Buckets have about the same area and sides that are multiples of ``step``,
so that every batch costs about the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from adapters.errors import InputError

Size = tuple[int, int]


@dataclass(frozen=True)
class BucketRule:
    """How pictures are assigned to sizes.

    Attributes:
        resolution: side of the square whose area no bucket exceeds.
        shortest, longest: limits of a bucket's sides.
        step: sides are multiples of this.
        keep_aspect: False crops every picture to the square.
        upscale: False never enlarges: small pictures get a smaller size of their own.
    """

    resolution: int
    shortest: int
    longest: int
    step: int
    keep_aspect: bool = True
    upscale: bool = True

    def __post_init__(self) -> None:
        if self.square[0] < 1:
            raise InputError(f"A resolution of {self.resolution} is below the bucket step of {self.step} pixels.")
        if self.shortest > self.longest:
            raise InputError(f"Buckets cannot be at least {self.shortest} and at most {self.longest} pixels long.")

    @property
    def square(self) -> Size:
        side = _floor(self.resolution, self.step)
        return (side, side)

    def sizes(self) -> list[Size]:
        """All buckets, widest last; the square is always one of them."""
        if not self.keep_aspect:
            return [self.square]
        area = self.resolution**2
        found = {self.square}
        for side in range(_ceil(self.shortest, self.step), self.longest + 1, self.step):
            other = min(_floor(area // side, self.step), _floor(self.longest, self.step))
            if other >= self.shortest:
                found |= {(side, other), (other, side)}
        return sorted(found, key=lambda size: (size[0] / size[1], size))

    def assign(self, size: Size) -> Size:
        """The bucket of a picture of ``size``.

        Raises:
            InputError: the picture is smaller than the smallest bucket and may not be enlarged.
        """
        width, height = size
        ratio = math.log(width / height)
        bucket = min(self.sizes(), key=lambda b: (abs(math.log(b[0] / b[1]) - ratio), -b[0] * b[1]))
        if self.upscale or (bucket[0] <= width and bucket[1] <= height):
            return bucket
        own = (_floor(min(width, bucket[0]), self.step), _floor(min(height, bucket[1]), self.step))
        if min(own) < max(self.shortest, self.step):
            raise InputError(
                f"a picture of {width} x {height} pixels is smaller than the smallest bucket "
                f"({max(self.shortest, self.step)} pixels); allow upscaling or lower bucket_min"
            )
        return own


@dataclass(frozen=True)
class Placement:
    """How a picture fills a bucket: resized to ``resized``, then cut at ``(left, top)`` to ``size``."""

    resized: Size
    left: int
    top: int
    size: Size


def place(picture: Size, bucket: Size, x: float = 0.5, y: float = 0.5) -> Placement:
    """Resize ``picture`` to cover ``bucket`` and cut it; ``x`` and ``y`` in [0, 1] choose where (0.5 = centre)."""
    scale = max(bucket[0] / picture[0], bucket[1] / picture[1])
    resized = (max(bucket[0], round(picture[0] * scale)), max(bucket[1], round(picture[1] * scale)))
    left = round((resized[0] - bucket[0]) * x)
    top = round((resized[1] - bucket[1]) * y)
    return Placement(resized, left, top, bucket)


def _floor(value: int, step: int) -> int:
    return value // step * step


def _ceil(value: int, step: int) -> int:
    return -(-value // step) * step
