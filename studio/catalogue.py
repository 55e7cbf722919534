"""The catalogue of methods for commands and pages; it never loads torch (:mod:`adapters.discovery`)."""

from __future__ import annotations

from adapters.catalogue import Choice, Stage, choices, find, stage
from adapters.catalogue import methods as declared


def check(name: str, stage_: Stage) -> None:
    """Raise :class:`~adapters.errors.InputError`, with the nearest name, unless the stage has a method ``name``."""
    find(stage_, name)


__all__ = ["Choice", "check", "choices", "declared", "stage"]
