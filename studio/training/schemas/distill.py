"""The distillation job: builds guidance, or sampling in few steps, into a LoRA on the same frozen base.

What is trained and how (rank, optimiser, schedule, saving) are the image trainer's fields with their help and limits;
only defaults differ.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from studio.composition.schema import ModelChoice
from studio.training.schemas import rules
from studio.training.schemas.base import TrainConfig, changed, option, preset_field
from studio.training.schemas.image import PictureFields, Targets, TrainImageConfig

Objective = Literal["guidance", "consistency"]
GuidanceMode = Literal["fixed", "strength", "embedding"]

_GUIDANCE = option("Guidance")
_GUIDANCE_MORE = option("Guidance", advanced=True)
_STATES = option("What it trains on")
_STATES_MORE = option("What it trains on", advanced=True)
_STEPS = option("Few steps")
_STEPS_MORE = option("Few steps", advanced=True)


def _in_group(name: str, group: dict[str, Any], **changes: Any) -> Any:
    return changed(TrainImageConfig, name, json_schema_extra=group, **changes)


class DistillConfig(PictureFields, ModelChoice, TrainConfig):
    """Distil guidance, or a whole sampling path, into a LoRA on the same base."""

    kind: ClassVar[str] = "distill"

    preset: str = preset_field(kind)

    # ---------------------------------------------------------------- Guidance
    name: str = _in_group("name", _GUIDANCE, default="guided")
    objective: Objective = Field(
        "guidance",
        description="guidance: one pass per step instead of two, same number of steps; "
        "consistency: pictures in 2 to 8 steps (LCM), guidance built in.",
        json_schema_extra=_GUIDANCE,
    )
    guidance: float = Field(
        7.5,
        description="Guidance w to build in, as pipelines count it (1 = none). "
        "guidance_mode strength: the guidance at weight 1.",
        json_schema_extra=_GUIDANCE,
    )
    guidance_mode: GuidanceMode = Field(
        "fixed",
        description="fixed: one w; strength: w is chosen with the adapter's weight; "
        "embedding: w stays a setting (an extra file beside the LoRA, UNet models only).",
        json_schema_extra=_GUIDANCE,
    )
    guidance_min: float = Field(
        1.0, ge=1, description="strength, embedding: smallest w to train.", json_schema_extra=_GUIDANCE_MORE
    )
    guidance_max: float | None = Field(
        None,
        gt=1,
        description="strength, embedding: largest w to train; empty = 1.6 times guidance.",
        json_schema_extra=_GUIDANCE_MORE,
    )
    guidance_rescale: float = Field(
        0.0, ge=0, le=1, description="Reduces the teacher's saturation at high w (0.7 is usual).",
        json_schema_extra=_GUIDANCE_MORE,
    )  # fmt: skip
    guidance_from: float = Field(
        0.0, ge=0, lt=1, description="Lowest noise level with guidance (0 = clean).",
        json_schema_extra=_GUIDANCE_MORE,
    )  # fmt: skip
    guidance_to: float = Field(
        1.0, gt=0, le=1, description="Highest noise level with guidance (1 = noise).", json_schema_extra=_GUIDANCE_MORE
    )
    null_prompt: str = Field(
        "",
        description="The prompt for 'no prompt' (your usual negative prompt can be built in here).",
        json_schema_extra=_GUIDANCE_MORE,
    )
    styles: list[str] = Field(
        default_factory=list,
        description="Adapters of both teacher and student, as name or name:weight; use the result on top of them.",
        json_schema_extra=_GUIDANCE,
    )
    force: bool = Field(
        False, description="Distil even a base that is already distilled.", json_schema_extra=_GUIDANCE_MORE
    )

    # ---------------------------------------------------------------- What it trains on
    states: Literal["data", "trajectories"] = Field(
        "trajectories",
        description="trajectories: states the guided teacher passes through as it draws prompts (no pictures needed); "
        "data: noisy pictures of a captioned folder.",
        json_schema_extra=_STATES,
    )
    data: str = _in_group("data", _STATES, default="", description="data: folder of pictures with captions.")
    prompts: str = Field(
        "",
        description="trajectories: text file with one prompt per line; empty = the captions of the folder in data.",
        json_schema_extra=_STATES,
    )
    trajectory_count: int = Field(128, ge=1, description="trajectories: how many to record.", json_schema_extra=_STATES)
    trajectories: str = Field(
        "",
        description="trajectories: folder to record them to or reuse them from; empty = in the run's folder.",
        json_schema_extra=_STATES_MORE,
    )
    resolution: int | None = _in_group("resolution", _STATES_MORE)
    buckets: bool = _in_group("buckets", _STATES_MORE)
    flip: bool = _in_group("flip", _STATES_MORE)
    skip_broken: bool = _in_group("skip_broken", _STATES_MORE)

    # ---------------------------------------------------------------- Few steps
    knots: int = Field(
        50,
        ge=1,
        le=1000,
        description="Points of the teacher's path: consistency joins neighbours; trajectories are recorded at them.",
        json_schema_extra=_STEPS_MORE,
    )
    inference_steps: int = Field(
        4, ge=1, le=50, description="consistency: steps for the samples, and the number the card recommends.",
        json_schema_extra=_STEPS,
    )  # fmt: skip
    distance: Literal["l2", "huber"] = Field(
        "l2", description="Distance between student and target; huber is LCM's for few steps.",
        json_schema_extra=_STEPS_MORE,
    )  # fmt: skip
    huber_c: float = Field(
        1e-3, gt=0, description="huber: where quadratic becomes absolute.", json_schema_extra=_STEPS_MORE
    )

    # ---------------------------------------------------------------- other defaults than the image trainer's
    rank: int = changed(TrainConfig, "rank", default=64)
    targets: Targets = changed(TrainImageConfig, "targets", default="all")
    weight_decay: float = changed(TrainConfig, "weight_decay", default=0.0)
    batch_size: int = changed(TrainConfig, "batch_size", default=16)
    warmup_ratio: float = changed(TrainConfig, "warmup_ratio", default=0.1)
    sample_prompts: list[str] = changed(
        TrainConfig, "sample_prompts", description="Prompts drawn during training; empty = the first."
    )

    @property
    def guidance_range(self) -> tuple[float, float]:
        """Smallest and largest w trained on."""
        if self.guidance_mode == "fixed":
            return self.guidance, self.guidance
        return self.guidance_min, self.guidance_max or round(1.6 * self.guidance, 6)

    def training(self) -> TrainImageConfig:
        """The same run as a configuration for the image trainer's parts (targets, optimiser, data, saving)."""
        shared = {name: getattr(self, name) for name in type(self).model_fields if name in _SHARED}
        return TrainImageConfig.model_validate({**shared, "mode": "captioned"})

    # ---------------------------------------------------------------- rules between fields
    @field_validator("guidance")
    @classmethod
    def _guides(cls, value: float) -> float:
        if not (math.isfinite(value) and value > 1):
            raise ValueError("guidance must be above 1: at 1 there is nothing to distil")
        return value

    @model_validator(mode="after")
    def _combinations(self) -> DistillConfig:
        rules.refuse(self, _REFUSED)
        self.training()  # what the image trainer refuses
        return self


def style(text: str) -> tuple[str, float]:
    """(name, weight) of an entry of ``styles``, ``name`` or ``name:weight``."""
    match = re.fullmatch(r"(.+):([-+]?[\d.]+)", text.strip())
    return (match.group(1), float(match.group(2))) if match else (text.strip(), 1.0)


_SHARED = frozenset(TrainImageConfig.model_fields) - {"guidance", "preset"}
"""Fields shared with the image trainer; its ``guidance`` means something else (Flux's input value), and its presets
are its own."""

_REFUSED: list[rules.Refusal] = [
    (
        lambda c: c.objective == "consistency" and c.guidance_mode == "strength",
        "the path of few steps is not linear in the guidance: choose guidance_mode fixed or embedding",
    ),
    (
        lambda c: c.guidance_mode != "fixed" and c.guidance_range[0] >= c.guidance_range[1],
        "guidance_min must be below guidance_max",
    ),
    (
        lambda c: c.guidance_from >= c.guidance_to,
        "guidance_from must be below guidance_to",
    ),
    (
        lambda c: c.guidance_mode == "strength" and c.guidance_rescale > 0,
        "a rescaled teacher is not linear in the guidance: set guidance_rescale to 0 or guidance_mode to fixed",
    ),
    (
        lambda c: c.states == "data" and not c.data.strip(),
        "states 'data' needs a folder of captioned pictures in data",
    ),
    (
        lambda c: c.states == "trajectories" and not (c.data.strip() or c.prompts.strip()),
        "trajectories need prompts: a text file with one per line in prompts, or a captioned folder in data",
    ),
]
