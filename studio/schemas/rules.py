"""Checks of values that several job schemas make."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

Refusal = tuple[Callable[[Any], Any], str]
"""What is wrong with a configuration (true when it is), and the sentence that says so."""


def file_name(value: str) -> str:
    """A name that can be a file's on every system."""
    if not re.fullmatch(r"[\w][\w .+-]*", value):
        raise ValueError("a name has letters, digits, spaces and . _ + - only, and starts with a letter or digit")
    return value


def learning_rate(value: float | None) -> float | None:
    """Finite and above 0; None stands for "as another one"."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError("a learning rate must be a finite number above 0")
    return value


def regular_expression(value: str) -> str:
    """One that compiles."""
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
