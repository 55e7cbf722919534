"""Regions of a picture: which adapters act where, and how. Part of the composition's schema.

:class:`RegionFields` is inherited by :class:`~studio.composition.schema.ComposeConfig`. Its fields are flat like all
others: one field is one YAML key, one flag and one widget, in the group "Regions".
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator

from studio.composition import methods
from studio.schema import JobConfig
from studio.training.schemas import rules
from studio.training.schemas.rules import Strength

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 as fractions of width and height, from the top left corner; the end is exclusive."""

REGIONAL_METHODS = methods.with_regions()
"""Methods that use regions; the others refuse them."""

DEFAULT_METHOD = methods.usual(regional=True)
"""The method when regions are given and no method is."""

_REGIONS: dict[str, Any] = {"group": "Regions", "advanced": False}
_REGIONS_MORE: dict[str, Any] = {"group": "Regions in detail", "advanced": True}


class Region(JobConfig):
    """A part of the picture with its own adapters."""

    name: str = Field("", description="Its name; empty = its adapters' names.")
    box: Box | None = Field(None, description="x0, y0, x1, y1 between 0 and 1 from the top left; or give a mask.")
    mask: str = Field(
        "", description="Mask with the picture's shape, white inside the region: a file or a data: URI of a PNG."
    )
    adapters: list[str] = Field(description="Names of the composition's adapters that act here and nowhere else.")
    prompt: str = Field("", description="What to draw here; empty = the whole prompt.")
    negative: str | None = Field(None, description="What to avoid here; empty = the whole negative prompt.")
    scale: float = Field(1.0, description="Factor on the adapters' weights in this region.")
    schedule: list[Strength] = Field(
        default_factory=list, description="Keyframes (position, factor) of this region; empty = always 1."
    )
    schedule_by: Literal["step", "sigma"] = Field(
        "step", description="Positions of the schedule: step = progress, sigma = the sampler's noise level."
    )
    words: list[str] = Field(
        default_factory=list,
        description="Words of its prompt that name its subject; empty = its adapters' triggers.",
    )

    @field_validator("box")
    @classmethod
    def _inside(cls, box: Box | None) -> Box | None:
        if box is None:
            return None
        x0, y0, x1, y1 = box
        if not all(math.isfinite(edge) and 0 <= edge <= 1 for edge in box):
            raise ValueError("a box is x0, y0, x1, y1 between 0 and 1, as fractions of the picture")
        if x1 <= x0 or y1 <= y0:
            raise ValueError("a box needs x0 < x1 and y0 < y1 (x to the right, y downwards)")
        return box

    @field_validator("adapters")
    @classmethod
    def _some(cls, names: list[str]) -> list[str]:
        if not names:
            raise ValueError("a region needs at least one adapter")
        if len(set(names)) != len(names):
            raise ValueError("an adapter is named twice in a region")
        return names

    @field_validator("scale")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError("a scale must be a finite number")
        return value

    @model_validator(mode="after")
    def _keyframes(self) -> Self:
        rules.keyframes(self.schedule, self.schedule_by)
        return self

    @model_validator(mode="after")
    def _one_place(self) -> Region:
        if self.box is not None and self.mask:
            raise ValueError("give a region a box or a mask, not both")
        return self


Regions = Annotated[
    Annotated[Literal["auto"], Tag("[auto]")] | Annotated[list[Region], Tag("[list]")],
    Discriminator(lambda value: "[auto]" if isinstance(value, str) else "[list]"),
]
"""A list of regions, or "auto"."""


class RegionFields(BaseModel):
    """Where adapters act, and the switches of LoRA-Composer's parts (arXiv 2403.11627)."""

    regions: Regions = Field(
        default_factory=list,
        description="Parts of the picture with their own adapters and prompts; adapters in no region act "
        "everywhere. auto: every adapter gets the place where the first steps draw its subject.",
        json_schema_extra=_REGIONS,
    )
    scope: Literal["cross", "spatial"] | None = Field(
        None,
        description="lora-composer: cross uses an adapter's cross-attention layers only (the paper's way), spatial all "
        "of its layers inside the region. Empty = cross.",
        json_schema_extra=_REGIONS_MORE,
    )
    self_mask: bool | None = Field(
        None,
        description="Regions do not attend to each other in self-attention. Empty = as the method says "
        "(lora-composer: on, others: off).",
        json_schema_extra=_REGIONS_MORE,
    )
    reinit: bool | None = Field(
        None,
        description="Start each region from the noise that suits its subject best. Empty = as the method says.",
        json_schema_extra=_REGIONS_MORE,
    )
    refine: bool | None = Field(
        None,
        description="Correct the picture in the first half of the steps so that every subject appears in its region: "
        "costs a pass with gradients per step. Empty = lora-composer on models of Stable Diffusion 1.5's size.",
        json_schema_extra=_REGIONS_MORE,
    )
    gaussian: bool = Field(
        True, description="refine: pull subjects towards the centre of their region.", json_schema_extra=_REGIONS_MORE
    )
    fill_loss: bool = Field(
        True, description="refine: make subjects fill their region.", json_schema_extra=_REGIONS_MORE
    )
    region_loss: bool = Field(
        True, description="refine: keep attention of a region inside it.", json_schema_extra=_REGIONS_MORE
    )
    refine_rate: float = Field(
        20.0, gt=0, allow_inf_nan=False, description="refine: step size on the latents.",
        json_schema_extra=_REGIONS_MORE,
    )  # fmt: skip
    trust_region: float | None = Field(
        0.05, gt=0, allow_inf_nan=False,
        description="refine: largest correction per step as a share of the latents' size; empty = none (the paper).",
        json_schema_extra=_REGIONS_MORE,
    )  # fmt: skip
    capture: int | None = Field(
        None, ge=1,
        description="reinit, refine, auto: read attention where the latents are this many times smaller "
        "(the paper: 4). Empty = 4, or finer for small pictures.",
        json_schema_extra=_REGIONS_MORE,
    )  # fmt: skip
    auto_steps: float = Field(
        0.3, gt=0, le=1,
        description="regions: auto: share of the steps used to find the places, before the picture is started.",
        json_schema_extra=_REGIONS_MORE,
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _method_of_regions(cls, values: Any) -> Any:
        """Regions without a method use the default one, which works with every model."""
        if isinstance(values, dict) and values.get("regions") and "method" not in values:
            return {**values, "method": DEFAULT_METHOD}
        return values

    @model_validator(mode="after")
    def _regions_fit(self) -> RegionFields:
        method = getattr(self, "method", DEFAULT_METHOD)
        if self.regions and method not in REGIONAL_METHODS:
            raise ValueError(f"'{method}' has no regions: choose {', '.join(REGIONAL_METHODS)}, or leave them out")
        if not self.regions and method in REGIONAL_METHODS:
            raise ValueError(f"'{method}' needs regions: give some, or 'auto'")
        if isinstance(self.regions, list):
            known = {use.name for use in getattr(self, "adapters", [])}
            for number, region in enumerate(self.regions, 1):
                if region.box is None and not region.mask:
                    raise ValueError(f"region {number} needs a box or a mask (or use regions: auto)")
                missing = [name for name in region.adapters if known and "" not in known and name not in known]
                if missing:
                    raise ValueError(
                        f"region {number} names the adapter '{missing[0]}', which the composition does not have"
                    )
        return self


__all__ = ["DEFAULT_METHOD", "REGIONAL_METHODS", "Box", "Region", "RegionFields"]
