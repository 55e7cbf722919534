"""Small measures that several benchmarks take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path


def peak_memory() -> int:
    """Peak resident bytes of this process (not ``ru_maxrss``, which starts at the parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Every value's mean with the up to ``width - 1`` values before it."""
    return [statistics.fmean(values[max(0, number - width + 1) : number + 1]) for number in range(len(values))]
