"""The base families for configurations and pages: names, display names, usual sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pipelines.diffusion.families import FAMILIES

FLOW = tuple(name for name, family in FAMILIES.items() if family.flow)
"""Families trained by flow matching."""

if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[("auto", *FAMILIES)]
"""A family's name in a configuration, or "auto"."""


def written(name: str) -> str:
    """The short display name of the family ``name``."""
    return FAMILIES[name].short if name in FAMILIES else {"language": "language"}.get(name, "unknown family")


def moving(name: str) -> bool:
    """Whether the family makes videos."""
    return name in FAMILIES and FAMILIES[name].video is not None


def usual_size(name: str) -> int:
    """The usual side of a family's pictures in pixels (512 if the family is unknown)."""
    return FAMILIES[name].usual_size if name in FAMILIES else 512
