"""Statistics of paired yes-or-no outcomes: intervals, exact tests, corrections. Rates are shares in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, binomtest

LEVEL, DRAWS, SEED = 0.95, 10_000, 0


@dataclass(frozen=True)
class Rate:
    """A share with its Wilson interval."""

    hits: int
    n: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """after - before, of the same items.

    Attributes:
        value, low, high: the difference of the shares, and its interval from a paired bootstrap.
        gained, lost: items that are hits only after, or only before.
        p: of McNemar's exact test.
    """

    n: int
    value: float
    low: float
    high: float
    gained: int
    lost: int
    p: float


def rate(outcomes: Sequence[bool]) -> Rate:
    """The share of hits."""
    hits, n = sum(outcomes), len(outcomes)
    if n == 0:
        return Rate(0, 0, 0.0, 0.0, 1.0)
    interval = binomtest(hits, n).proportion_ci(LEVEL, method="wilson")
    return Rate(hits, n, hits / n, float(interval.low), float(interval.high))


def change(before: Sequence[bool], after: Sequence[bool]) -> Change:
    """The change of a share between two outcomes of every item.

    The bootstrap draws only how many items were gained and lost, so the order of items does not matter.
    """
    n = len(before)
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    if n == 0:
        return Change(0, 0.0, -1.0, 1.0, 0, 0, 1.0)
    drawn = np.random.default_rng(SEED).multinomial(n, [gained / n, lost / n, (n - gained - lost) / n], DRAWS)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Change(n, (gained - lost) / n, float(low), float(high), gained, lost, mcnemar(gained, lost))


def mean_change(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences, and its bootstrap interval."""
    values = np.asarray(differences, dtype=float)
    picks = np.random.default_rng(SEED).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.quantile(values[picks].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(values.mean()), float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test on the discordant pairs."""
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for several tests (Holm 1979), in the given order."""
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = worst
    return adjusted


def smallest_drop(n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest drop that McNemar's test on ``n`` items detects with this power, if every change is a loss.

    Returns:
        A share; above 1 if no drop can be detected.
    """
    needed = next(lost for lost in range(1, 60) if mcnemar(0, lost) < alpha)
    return next((drop for drop in np.linspace(0, 1, 1001).tolist() if binom.sf(needed - 1, n, drop) >= power), 2.0)


def corrected(found: float, sensitivity: float, specificity: float) -> float | None:
    """Rogan and Gladen's true share from a judge's, clipped to [0, 1]; None for a judge no better than chance."""
    if sensitivity + specificity <= 1:
        return None
    return min(1.0, max(0.0, (found + specificity - 1) / (sensitivity + specificity - 1)))
