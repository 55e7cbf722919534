"""Strengths with regions: one row for the background and one per region.

Row 0 (the background) has the adapters of no region at their strength; row i also has those of region i, at their
strength times the region's factor (its scale times its schedule).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pipelines.diffusion.methods.step import Step, Strengths

Members = Sequence[Collection[int]]
"""For each region, the adapters that act in it."""

Factors = Sequence[Sequence[float]]
"""factors[k][i]: scale times schedule of region i at step k."""


def rows_of(strengths: Sequence[float], members: Members, factors: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """The rows of one step."""
    regional = {adapter for member in members for adapter in member}
    background = tuple(0.0 if i in regional else strength for i, strength in enumerate(strengths))
    inside = (
        tuple(strength * factor if i in member else background[i] for i, strength in enumerate(strengths))
        for member, factor in zip(members, factors, strict=True)
    )
    return background, *inside


def together(strengths: Strengths, members: Members, factors: Factors) -> list[Step]:
    """One prediction per step, with a row of strengths per region."""
    return _steps(strengths, members, factors, separate=False)


def apart(strengths: Strengths, members: Members, factors: Factors) -> list[Step]:
    """Separate predictions per step, for the background and each region."""
    return _steps(strengths, members, factors, separate=True)


def _steps(strengths: Strengths, members: Members, factors: Factors, separate: bool) -> list[Step]:
    made = []
    for strength, factor in zip(strengths, factors, strict=True):
        rows = rows_of(strength, members, factor)
        largest = tuple(max((row[i] for row in rows), key=abs) for i in range(len(strength)))
        made.append(Step(largest, separate, rows))
    return made
