"""Strength over the steps: piecewise-linear keyframes.

A schedule is a list of (position, factor), ascending. By "step" the position is the progress k / T of step k of T, from
0 to 1. By "sigma" it is the sampler's noise level before the step, which falls over the steps: in flow matching from 1
(noise) to 0 (picture), in diffusion sqrt((1 - a) / a) of the cumulative alpha a, from about 14.6 to 0 for Stable
Diffusion; so a schedule by sigma means the same with any number of steps and any shift.

Between two keyframes the factor is interpolated; before the first and after the last it is constant. Two keyframes at
the same position are a jump, from which the later one applies, so [0, 0.5) and [0.5, 1) share no step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from adapters.errors import InputError

Keyframes = Sequence[tuple[float, float]]

By = Literal["step", "sigma"]


@dataclass(frozen=True)
class Positions:
    """Where each denoiser call of a run stands: its progress, and its noise level if a schedule needs it."""

    step: Sequence[float]
    sigma: Sequence[float] = ()

    def factors(self, keyframes: Keyframes, by: By) -> list[float]:
        """The factor at each call."""
        return [factor_at(keyframes, position) for position in (self.sigma if by == "sigma" else self.step)]


def check_keyframes(keyframes: Keyframes, name: str, by: str = "step") -> tuple[tuple[float, float], ...]:
    """The keyframes as floats; ``name`` is that of the adapter or region in errors.

    Raises:
        InputError: the keyframes are unsorted, negative, above 1 by step, or not finite; or ``by`` is unknown.
    """
    if by not in get_args(By):
        raise InputError(f"The schedule of '{name}' is by '{by}': use step or sigma.")
    made = tuple((float(progress), float(factor)) for progress, factor in keyframes)
    progress = [point[0] for point in made]
    if any(not math.isfinite(value) for point in made for value in point):
        raise InputError(f"The schedule of '{name}' has a value that is not finite.")
    if by == "step" and any(not 0 <= value <= 1 for value in progress):
        raise InputError(f"The schedule of '{name}' has keyframes outside [0, 1]: {progress}.")
    if any(value < 0 for value in progress):
        raise InputError(f"The schedule of '{name}' has a negative noise level: {progress}.")
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
