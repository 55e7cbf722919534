"""The base families for configurations and pages: names, display names, usual sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pipelines.diffusion import methods
from pipelines.diffusion.families import FAMILIES, Family
from pipelines.diffusion.methods import Properties

FLOW = tuple(name for name, family in FAMILIES.items() if family.flow)
"""Families trained by flow matching."""

WRITING = ("language", "vision-language", "rna", "speech")
"""Families of models that write or classify instead of drawing pictures."""

if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[("auto", *FAMILIES)]
"""A family's name in a configuration, or "auto"."""


def written(name: str) -> str:
    """The short display name of the family ``name``."""
    if name in FAMILIES:
        return FAMILIES[name].short
    return name if name in WRITING else "unknown family"


def moving(name: str) -> bool:
    """Whether the family makes videos."""
    return name in FAMILIES and FAMILIES[name].video is not None


def works_with(name: str) -> tuple[str, ...]:
    """What the family ``name`` can be used for here, from its description; empty if it is unknown."""
    if name not in FAMILIES:
        return ()
    family = FAMILIES[name]
    regions = f"regions ({', '.join(able)})" if (able := regional_methods(family)) else ""
    tasks = {"image": "image to image", "inpaint": "inpainting", "edit": "editing", "controlnet": "ControlNet"}
    if family.video is not None:
        tasks["image"] = "image to video"
    others = [title for task, title in tasks.items() if task in family.other_pipelines]
    found = ["merge", "switch", "composite", regions, *others, "" if family.untrainable else "training"]
    return tuple(one for one in found if one)


def regional_methods(family: Family) -> tuple[str, ...]:
    """The methods whose regions work with ``family``."""

    def able(known: Properties) -> bool:
        if known.regions == "network":
            return family.inner_regions and (known.transformers or family.unet)
        return known.regional and (family.video is None or family.video.regions)

    return methods.names(able)


def licence(name: str) -> str:
    """The licence of the public checkpoints of the family ``name``; empty if it is unknown."""
    return FAMILIES[name].licence if name in FAMILIES else ""


def usual_size(name: str) -> int:
    """The usual side of a family's pictures in pixels (512 if the family is unknown)."""
    return FAMILIES[name].usual_size if name in FAMILIES else 512
