"""Strength over the steps: piecewise-linear keyframes.

A schedule is a list of (progress, factor), with progress = k / T for step k of T, ascending from 0 to 1. Between two
keyframes the factor is interpolated; before the first and after the last it is constant. Two keyframes with the same
progress are a jump, from which the later one applies, so [0, 0.5) and [0.5, 1) share no step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from adapters.errors import InputError

Keyframes = Sequence[tuple[float, float]]


def check_keyframes(keyframes: Keyframes, name: str) -> tuple[tuple[float, float], ...]:
    """The keyframes as floats; ``name`` is that of the adapter or region in errors.

    Raises:
        InputError: the keyframes are unsorted, outside [0, 1], or not finite.
    """
    made = tuple((float(progress), float(factor)) for progress, factor in keyframes)
    progress = [point[0] for point in made]
    if any(not math.isfinite(value) for point in made for value in point):
        raise InputError(f"The schedule of '{name}' has a value that is not finite.")
    if any(not 0 <= value <= 1 for value in progress):
        raise InputError(f"The schedule of '{name}' has keyframes outside [0, 1]: {progress}.")
    if progress != sorted(progress):
        raise InputError(f"The schedule of '{name}' is not in order ({progress}): sort its keyframes.")
    return made


def factor_at(keyframes: Keyframes, progress: float) -> float:
    """The factor at ``progress`` (1 without keyframes)."""
    if not keyframes:
        return 1.0
    before = [point for point in keyframes if point[0] <= progress]
    after = [point for point in keyframes if point[0] > progress]
    if not before:
        return after[0][1]
    if not after:
        return before[-1][1]
    (p0, f0), (p1, f1) = before[-1], after[0]
    return f0 + (f1 - f0) * (progress - p0) / (p1 - p0)


def window(start: float, end: float) -> tuple[tuple[float, float], ...]:
    """Keyframes of factor 1 in [``start``, ``end``) and 0 elsewhere; raises :class:`InputError` for another range."""
    if not 0 <= start < end <= 1:
        raise InputError(f"A step range must be 0 <= start < end <= 1, got {start}-{end}.")
    rise = ((0.0, 0.0), (start, 0.0), (start, 1.0)) if start > 0 else ((0.0, 1.0),)
    fall = ((end, 1.0), (end, 0.0), (1.0, 0.0)) if end < 1 else ((1.0, 1.0),)
    return (*rise, *fall)
