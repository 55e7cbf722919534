"""The base families for configurations and pages: names, how people write them, usual sizes."""

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
    """How people write the family ``name``, in a few characters."""
    return FAMILIES[name].short if name in FAMILIES else {"language": "language"}.get(name, "unknown family")


def usual_size(name: str) -> int:
    """Pixels of a side of pictures of a family (512 where it is unknown)."""
    return FAMILIES[name].usual_size if name in FAMILIES else 512
