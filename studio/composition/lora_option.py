"""Parses ``--lora [name=]path[:weight][@start-end]``, one adapter of a composition."""

from __future__ import annotations

import re
from typing import Any

from adapters.errors import InputError

FORM = "[name=]path[:weight][@start-end]"

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_RANGE = re.compile(rf"(.*)@({_NUMBER})-({_NUMBER})")
_WEIGHT = re.compile(rf"(.*):({_NUMBER})")
_NO_NUMBER = re.compile(r".*:[-+]?(nan|inf|infinity)", re.IGNORECASE)
_NAME = re.compile(r"([^=/\\]+)=(.+)")


def parse(text: str) -> dict[str, Any]:
    """The values of one :class:`~studio.composition.schema.AdapterUse`.

    ``@0-0.4`` makes the adapter act in the first 40 % of the steps.

    Raises:
        InputError: there is no path, the range is not one, or the weight is not finite.
    """
    use: dict[str, Any] = {}
    rest = text
    if match := _RANGE.fullmatch(rest):
        rest = match.group(1)
        use["schedule"] = window("--lora", text, float(match.group(2)), float(match.group(3)))
    if _NO_NUMBER.fullmatch(rest):
        raise InputError(f"--lora '{text}': the weight after ':' must be a finite number, as in :0.8.")
    if match := _WEIGHT.fullmatch(rest):
        rest = match.group(1)
        use["weight"] = float(match.group(2))
    if match := _NAME.fullmatch(rest):
        use["name"], rest = match.group(1).strip(), match.group(2)
    if not rest:
        raise InputError(f"--lora needs {FORM}, got '{text}'.")
    use["path"] = rest
    return use


def window(flag: str, text: str, start: float, end: float) -> list[list[float]]:
    """Keyframes that are 1 from ``start`` until just before ``end``; two at one place are a jump."""
    if not 0 <= start < end <= 1:
        raise InputError(f"{flag} '{text}': the range after @ must rise and be between 0 and 1, as in @0-0.4.")
    before = [[0.0, 0.0], [start, 0.0]] if start > 0 else []
    after = [[end, 0.0], [1.0, 0.0]] if end < 1 else []
    return [*before, [start, 1.0], [end, 1.0], *after]
