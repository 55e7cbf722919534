"""Small measures shared by several benchmarks."""

from __future__ import annotations

import random
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


def ratio_interval(values: Sequence[float], others: Sequence[float], draws: int = 20_000) -> str:
    """The 95 % bootstrap interval of mean(values) / mean(others) over pairs (seeds), as text."""
    rng, count, ratios = random.Random(0), len(values), []
    for _ in range(draws):
        chosen = rng.choices(range(count), k=count)
        ratios.append(sum(values[i] for i in chosen) / sum(others[i] for i in chosen))
    ratios.sort()
    return f"{ratios[draws // 40]:.2f} to {ratios[-draws // 40]:.2f}"
