"""Parses ``--lora [name=]path[:weight][@start-end]`` (or ``@sigma=low-high``), one adapter of a composition."""

from __future__ import annotations

import re
from typing import Any

from adapters.errors import InputError

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"

FORM = "[name=]path[:weight][@start-end]"

TIMES = rf"(.*)@(sigma=)?({NUMBER})-({NUMBER})"
"""A text, and after @ a range of steps or, after ``sigma=``, of noise levels."""

_RANGE = re.compile(TIMES)
_WEIGHT = re.compile(rf"(.*):({NUMBER})")
_NO_NUMBER = re.compile(r".*:[-+]?(nan|inf|infinity)", re.IGNORECASE)
_NAME = re.compile(r"([^=/\\]+)=(.+)")


def parse(text: str) -> dict[str, Any]:
    """The values of one :class:`~studio.composition.schema.AdapterUse`.

    ``@0-0.4`` makes the adapter act in the first 40 % of the steps, ``@sigma=0.6-1`` while the sampler's noise level is
    at least 0.6 and less than 1.

    Raises:
        InputError: there is no path, the range is not one, or the weight is not finite.
    """
    use: dict[str, Any] = {}
    rest = text
    if match := _RANGE.fullmatch(rest):
        rest = match.group(1)
        use |= window("--lora", text, *match.groups()[1:])
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


def window(flag: str, text: str, by: str | None, low: str, high: str) -> dict[str, Any]:
    """A schedule that is 1 from ``low`` until just before ``high``, as values of an adapter or region.

    Args:
        flag, text: the option, for the error.
        by: "sigma=" for noise levels, else steps.

    Raises:
        InputError: the range does not rise, or is outside [0, 1] by step.
    """
    start, end = float(low), float(high)
    if by:
        if not 0 <= start < end:
            raise InputError(f"{flag} '{text}': the range after @sigma= must rise from 0 or more, as in @sigma=0.6-1.")
        before = [[start, 0.0]] if start > 0 else []
        return {"schedule": [*before, [start, 1.0], [end, 1.0], [end, 0.0]], "schedule_by": "sigma"}
    if not 0 <= start < end <= 1:
        raise InputError(f"{flag} '{text}': the range after @ must rise and be between 0 and 1, as in @0-0.4.")
    before = [[0.0, 0.0], [start, 0.0]] if start > 0 else []
    after = [[end, 0.0], [1.0, 0.0]] if end < 1 else []
    return {"schedule": [*before, [start, 1.0], [end, 1.0], *after]}
