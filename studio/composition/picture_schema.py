"""Pictures that a composition starts from or follows: part of its schema, flat like the rest."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, model_validator

from studio.composition import methods

PICTURES = ("image", "mask", "control_image")
"""Fields that are pictures: a file, or a ``data:`` URI (in recipes, which repeat without the file)."""

_START: dict[str, Any] = {"group": "Start from a picture", "advanced": False}
_CONTROL: dict[str, Any] = {"group": "ControlNet", "advanced": True}


class PictureFields(BaseModel):
    """Image to image, inpainting and ControlNet."""

    image: str = Field(
        "",
        description="Start picture (image to image). Without width and height the canvas follows it.",
        json_schema_extra=_START,
    )
    mask: str = Field(
        "",
        description="The part of the start picture to redraw: white is redrawn, black stays (inpainting).",
        json_schema_extra=_START,
    )
    strength: float | None = Field(
        None, ge=0, le=1,
        description="How much of the start picture is redrawn: only this share of the steps runs, the last ones (0.6 "
        "of 25: 15), and schedules of adapters span those. 1 = all of it. Empty = diffusers' own for the model.",
        json_schema_extra=_START,
    )  # fmt: skip
    controlnet: str = Field(
        "",
        description="ControlNet of the base's family: directory or hub id.",
        json_schema_extra=_CONTROL,
    )
    control_image: str = Field(
        "",
        description="What the ControlNet follows: a picture of edges, depth, poses ... as it was trained with.",
        json_schema_extra=_CONTROL,
    )
    control_scale: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="Strength of the ControlNet.", json_schema_extra=_CONTROL
    )

    @property
    def task(self) -> str:
        """The family's pipeline for this (:meth:`pipelines.diffusion.MultiLoRAPipeline.for_task`)."""
        start = "inpaint" if self.mask else "image" if self.image else ""
        return f"controlnet {start}".strip() if self.controlnet else start

    @model_validator(mode="after")
    def _pictures_fit(self) -> PictureFields:
        if self.mask and not self.image:
            raise ValueError("a mask says what of a start picture is redrawn: give image too")
        if self.strength is not None and not self.image:
            raise ValueError("strength says how much of a start picture is redrawn: give image too")
        if self.strength == 0:
            raise ValueError("at strength 0 no step runs and the picture stays as it is: give more, up to 1")
        if self.controlnet and not self.control_image:
            raise ValueError("a ControlNet follows a picture: give control_image too")
        if self.control_image and not self.controlnet:
            raise ValueError("control_image is for a ControlNet: give controlnet too")
        if self.control_scale != 1 and not self.controlnet:
            raise ValueError("control_scale is for a ControlNet: give controlnet and control_image too")
        method = getattr(self, "method", "")
        parts = [getattr(self, name, None) for name in ("reinit", "refine")]
        if self.task and (any(parts) or (methods.known(method).parts and parts != [False, False])):
            raise ValueError(
                f"reinit and refine of '{method}' begin with pure noise, not with a picture or a ControlNet: switch "
                "both off, or choose activation"
            )
        return self
