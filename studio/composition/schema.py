"""The composition job: one prompt, several adapters, one method."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from adapters.compression.backends import Quantization
from studio.composition.picture_schema import PictureFields
from studio.composition.region_schema import RegionFields
from studio.library.base_families import FamilyName
from studio.schema import JobConfig
from studio.training.schemas import rules
from studio.training.schemas.rules import Strength

_VIDEO: dict[str, Any] = {"group": "Video", "advanced": True}
_RARE: dict[str, Any] = {"group": "Rarely needed", "advanced": True}


class AdapterUse(JobConfig):
    """One adapter in a composition."""

    name: str = Field("", description="Name in this composition; empty = the file's name.")
    path: str = Field(description="Name in the library, file, PEFT directory or hub id.")
    weight: float = Field(1.0, description="Strength in the denoiser.")
    te_weight: float | None = Field(None, description="Strength in the text encoders; empty = same as weight.")
    triggers: list[str] = Field(default_factory=list, description="Trigger words of the concept or style.")
    blocks: dict[str, float] = Field(
        default_factory=dict, description="Extra factor per block, by module prefix ('down_blocks.1': 0.5)."
    )
    schedule: list[Strength] = Field(
        default_factory=list,
        description="Keyframes (position, strength), interpolated between; empty = always at full strength.",
    )
    denoiser: str = Field(
        "",
        description="Of a base with several denoisers (Wan 2.2 A14B), the only one to adapt, such as transformer_2; "
        "empty = as the file says.",
    )
    schedule_by: Literal["step", "sigma"] = Field(
        "step",
        description="Positions of the schedule: step = progress from 0 to 1; sigma = the sampler's noise level (1 to 0 "
        "in flow matching, about 14.6 to 0 in Stable Diffusion).",
    )

    @field_validator("weight", "te_weight")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError("a weight must be a finite number")
        return value

    @model_validator(mode="after")
    def _keyframes(self) -> Self:
        rules.keyframes(self.schedule, self.schedule_by)
        return self

    @property
    def strengths(self) -> tuple[float, float]:
        """Its strength in the denoiser and in the text encoders."""
        return self.weight, self.weight if self.te_weight is None else self.te_weight

    def plus(self, other: AdapterUse) -> AdapterUse:
        """This adapter with the sum of both strengths."""
        both = (self, other)
        text = None
        if any(use.te_weight is not None for use in both):
            text = sum(use.strengths[1] for use in both)
        return self.model_copy(update={"weight": self.weight + other.weight, "te_weight": text})


def added_up(uses: list[AdapterUse]) -> list[AdapterUse]:
    """Each adapter once: strengths of entries that differ only in strength add up, as in prompts and in the chat."""
    found: dict[str, AdapterUse] = {}
    for use in uses:
        rest = use.model_dump_json(exclude={"weight", "te_weight"})
        found[rest] = found[rest].plus(use) if rest in found else use
    return list(found.values())


class ModelChoice(JobConfig):
    """Which base model, and how it runs."""

    base: str = Field("tinymoji", description="Base model: name in the library, hub id, directory or .safetensors.")
    family: FamilyName = Field("auto", description="Model family.")
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = Field("auto", description="Precision of the weights.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps ...")
    attention: Literal["auto", "sdpa", "xformers"] = Field("auto", description="Attention backend.")
    memory: Literal["none", "balanced", "low"] = Field(
        "none", description="Memory preset: less memory for more time (offloading, tiling)."
    )
    quantization: Quantization = Field(
        "none", description="Store the denoiser's linear layers in few bits: 8bit, 4bit (bitsandbytes), int8, int4 "
        "(torchao).",
    )  # fmt: skip
    denoiser: str = Field(
        "", description="A .gguf or .safetensors file whose denoiser replaces the base's (of two, beside the "
        "other: x_high_noise, x_low_noise); empty = the base's own."
    )


class ComposeConfig(RegionFields, PictureFields, ModelChoice):
    """Make pictures from one prompt with several adapters."""

    kind: ClassVar[str] = "compose"

    prompt: str = Field("", description="What to draw.")
    negative_prompt: str = Field("", description="What to avoid.")
    adapters: list[AdapterUse] = Field(default_factory=list, description="Adapters to combine, in order.")
    method: str = Field("merge", description="How the adapters are combined (see: studio methods).")
    tau: int = Field(1, ge=1, description="switch: steps per turn of an adapter.")
    te_mode: Literal["auto", "per_adapter", "official", "merged"] = Field(
        "auto", description="Text encoder LoRAs: one encoding per adapter, as in the paper's program, or all at once.",
        json_schema_extra=_RARE,
    )  # fmt: skip
    adapter_batch: int | None = Field(
        None, ge=1, description="composite: adapters denoised at once; fewer need less memory. Empty = all.",
        json_schema_extra=_RARE,
    )  # fmt: skip
    fold: bool = Field(
        True, description="Compute with the adapters inside the weights where strengths stay the same: faster, the "
        "same picture up to rounding.", json_schema_extra=_RARE,
    )  # fmt: skip
    steps: int | None = Field(
        None, ge=1, le=1000, description="Denoising steps; empty = the base's own (25 for most, few where it or an "
        "adapter is distilled).",
    )  # fmt: skip
    guidance_scale: float | None = Field(
        None, ge=0, description="Classifier-free guidance; 1 switches it off; empty = the base's own."
    )
    allow_double_guidance: bool = Field(
        False, description="Guide on top of the guidance that a distilled adapter has built in.",
        json_schema_extra=_RARE,
    )  # fmt: skip
    scheduler: Literal["default", "ddim", "dpm++", "euler", "euler_a", "unipc", "lcm"] = Field(
        "default", description="Sampler; default = the base model's own."
    )
    width: int | None = Field(None, ge=8, description="Pixels; empty = the base model's own size.")
    height: int | None = Field(None, ge=8, description="Pixels; empty = the base model's own size.")
    seed: int = Field(0, ge=0, description="Seed of the first picture; picture k uses seed + k.")
    images: int = Field(1, ge=1, le=64, description="How many pictures.")
    frames: int | None = Field(
        None, ge=1, description="Of a base that makes videos: frames of each; empty = the model's own number.",
        json_schema_extra=_VIDEO,
    )  # fmt: skip
    fps: float | None = Field(
        None, gt=0, le=240, allow_inf_nan=False, json_schema_extra=_VIDEO,
        description="Of a base that makes videos: frames shown per second; empty = the model's own rate.",
    )  # fmt: skip

    _added_up = field_validator("adapters")(added_up)

    @model_validator(mode="after")
    def _unique_names(self) -> ComposeConfig:
        names = [use.name for use in self.adapters if use.name]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"adapter names must differ, given twice: {', '.join(sorted(twice))}")
        return self

    def kept_in(self, folder: Path) -> Self:
        """With copies of its pictures in the job's folder."""
        from studio.composition import start_picture

        return self.model_copy(update=start_picture.copied(self, folder))
