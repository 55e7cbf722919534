"""Checks of values shared by several job schemas."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Refusal = tuple[Callable[[Any], Any], str]
"""Whether a configuration is wrong, and the sentence that says so."""


Strength = tuple[float, float]
"""(progress in [0, 1], strength): one keyframe of a schedule."""


def file_name(value: str) -> str:
    """Check that the name can be a file name on every system."""
    if not re.fullmatch(r"[\w][\w .+-]*", value):
        raise ValueError("a name has letters, digits, spaces and . _ + - only, and starts with a letter or digit")
    return value


def learning_rate(value: float | None) -> float | None:
    """Check that it is finite and above 0; None stands for "as another rate"."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError("a learning rate must be a finite number above 0")
    return value


def keyframes(value: Sequence[Strength], by: str = "step") -> Sequence[Strength]:
    """Check that keyframes are in order and finite; in [0, 1] by step, from 0 by sigma."""
    positions = [point[0] for point in value]
    if any(not math.isfinite(number) for point in value for number in point):
        raise ValueError("schedule positions and strengths must be finite numbers")
    if by == "step" and (positions != sorted(positions) or any(not 0 <= p <= 1 for p in positions)):
        raise ValueError("schedule keyframes must be sorted and lie in [0, 1]")
    if positions != sorted(positions) or any(p < 0 for p in positions):
        raise ValueError("schedule keyframes by sigma must be sorted, from the lowest noise level (0 or more) up")
    return value


def regular_expression(value: str) -> str:
    """Check that the regular expression compiles."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return value


def refuse(config: Any, refusals: Iterable[Refusal]) -> None:
    """Raise ``ValueError`` with the sentence of the first refusal that applies."""
    for broken, sentence in refusals:
        if broken(config):
            raise ValueError(sentence)


def one_held_out(what: str) -> Refusal:
    """Refuse two sources of held-out data.

    Args:
        what: the field's word for the data ("rows" ...).
    """
    return (
        lambda config: bool(config.validation_data) and config.validation_split > 0,
        f"{what} to measure with come from validation_data or from validation_split, not from both",
    )
