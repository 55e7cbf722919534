"""Fields of every training job: adapter, optimiser, schedule and saving.

The fields are flat on purpose: one field is one YAML key, one command line flag and one widget. ``group`` names the
section of the form, ``advanced`` moves a field behind the common ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from studio.schema import JobConfig
from studio.training import presets
from studio.training.schemas import rules

Optimizer = Literal["adamw", "adamw8bit", "adafactor", "sgd", "prodigy", "schedulefree-adamw"]
LrSchedule = Literal["constant", "linear", "cosine", "cosine-restarts", "polynomial"]
Tracker = Literal["none", "tensorboard", "wandb", "mlflow", "comet_ml", "aim"]
Precision = Literal["fp32", "fp16", "bf16"]

GROUPS = (
    "",
    "Model",
    "Guidance",
    "What it trains on",
    "Few steps",
    "Data",
    "Labels",
    "Pruning",
    "Alignment",
    "Adapter",
    "Method",
    "Optimiser",
    "Schedule",
    "Noise and loss",
    "Memory and speed",
    "Samples and saving",
)
"""Sections of a form, in order; fields without a group are about the base model."""


def option(group: str, advanced: bool = False) -> dict[str, Any]:
    """A field's settings for forms."""
    return {"group": group, "advanced": advanced}


def changed(schema: type[BaseModel], name: str, **changes: Any) -> Any:
    """A field of ``schema`` for another schema, with ``changes`` (default, description ...)."""
    field = copy.copy(schema.model_fields[name])
    for key, value in changes.items():
        setattr(field, key, value)
    return field


_DATA = option("Data")
_DATA_MORE = option("Data", advanced=True)
_ADAPTER = option("Adapter")
_ADAPTER_MORE = option("Adapter", advanced=True)
_OPTIMISER = option("Optimiser")
_OPTIMISER_MORE = option("Optimiser", advanced=True)
_SCHEDULE = option("Schedule")
_SCHEDULE_MORE = option("Schedule", advanced=True)
_LOSS = option("Noise and loss")
_LOSS_MORE = option("Noise and loss", advanced=True)
_MEMORY = option("Memory and speed")
_MEMORY_MORE = option("Memory and speed", advanced=True)
_OUTPUT = option("Samples and saving")
_OUTPUT_MORE = option("Samples and saving", advanced=True)


def _place(field: Any) -> int:
    extra = field.json_schema_extra
    return GROUPS.index(extra.get("group", "") if isinstance(extra, dict) else "")


def preset_field(kind: str) -> Any:
    """The field ``preset`` of a kind of training, with the names there are."""
    known = ", ".join(presets.names(kind))
    text = f"Starting values ({known}); other keys override them."
    return Field("", description=text, json_schema_extra=_DATA)


class TrainConfig(JobConfig):
    """Base of the training schemas, with the fields of every kind."""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Put the fields in the order of :data:`GROUPS`; pydantic lists a base's fields before one's own."""
        super().__pydantic_init_subclass__(**options)
        cls.__pydantic_fields__ = dict(sorted(cls.__pydantic_fields__.items(), key=lambda item: _place(item[1])))
        cls.model_rebuild(force=True)

    preset: str = Field("", description="Starting values; other keys override them.", json_schema_extra=_DATA)
    name: str = Field("adapter", description="Name of the new adapter.", json_schema_extra=_DATA)
    rank: int = Field(16, ge=1, description="Rank of the linear layers.", json_schema_extra=_ADAPTER)
    alpha: float | None = Field(
        None,
        gt=0,
        description="The update is scaled by alpha / rank. Empty = rank.",
        json_schema_extra=_ADAPTER,
    )
    target_regex: str = Field(
        "",
        description="Instead of a preset: regular expression of whole module names.",
        json_schema_extra=_ADAPTER_MORE,
    )
    exclude_regex: str = Field(
        "", description="Regular expression of module names that stay untouched.", json_schema_extra=_ADAPTER_MORE
    )
    continue_from: str = Field(
        "",
        description="Start from this adapter (library name or file) instead of a new one.",
        json_schema_extra=_ADAPTER_MORE,
    )
    optimizer: Optimizer = Field("adamw", description="Optimiser.", json_schema_extra=_OPTIMISER)
    learning_rate: float = Field(
        1e-4, description="Learning rate (prodigy: a factor, use 1).", json_schema_extra=_OPTIMISER
    )
    weight_decay: float = Field(0.01, ge=0, description="Weight decay.", json_schema_extra=_OPTIMISER_MORE)
    beta1: float = Field(
        0.9, ge=0, lt=1, description="First moment decay (momentum of sgd).", json_schema_extra=_OPTIMISER_MORE
    )
    beta2: float = Field(0.999, ge=0, lt=1, description="Second moment decay.", json_schema_extra=_OPTIMISER_MORE)
    epsilon: float = Field(1e-8, gt=0, description="Added to the denominator.", json_schema_extra=_OPTIMISER_MORE)
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are clipped to this norm; 0 = no clipping.", json_schema_extra=_OPTIMISER_MORE
    )
    seed: int = Field(0, ge=0, description="Seed of all random numbers of the run.", json_schema_extra=_OPTIMISER)
    steps: int = Field(500, ge=1, description="Optimiser steps.", json_schema_extra=_SCHEDULE)
    batch_size: int = Field(4, ge=1, description="Pictures per forward pass and process.", json_schema_extra=_SCHEDULE)
    gradient_accumulation: int = Field(
        1, ge=1, description="Forward passes per optimiser step.", json_schema_extra=_SCHEDULE
    )
    lr_schedule: LrSchedule = Field(
        "cosine", description="Learning rate schedule after the warm-up.", json_schema_extra=_SCHEDULE
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.", json_schema_extra=_SCHEDULE_MORE)
    warmup_ratio: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Warm-up as a share of all steps, when warmup_steps is 0.",
        json_schema_extra=_SCHEDULE_MORE,
    )
    min_lr_ratio: float = Field(
        0.0,
        ge=0,
        le=1,
        description="The schedule ends at this share of the learning rate.",
        json_schema_extra=_SCHEDULE_MORE,
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations instead of storing them: less memory, about a third more time.",
        json_schema_extra=_MEMORY,
    )
    tf32: bool = Field(True, description="Fast fp32 products on Nvidia GPUs.", json_schema_extra=_MEMORY_MORE)
    ema: bool = Field(
        False, description="Save (and sample) a running average of the adapter.", json_schema_extra=_OUTPUT
    )
    ema_decay: float = Field(0.995, gt=0, lt=1, description="EMA decay per step.", json_schema_extra=_OUTPUT_MORE)
    sample_prompts: list[str] = Field(
        default_factory=list,
        description="Prompts drawn during training; {trigger} is replaced. Empty = the first caption.",
        json_schema_extra=_OUTPUT,
    )
    sample_every: int | None = Field(
        None,
        ge=0,
        description="Draw samples every N steps; empty = four times over the run; 0 = only at the end, if there are "
        "sample_prompts.",
        json_schema_extra=_OUTPUT,
    )
    save_every: int | None = Field(
        None,
        ge=0,
        description="Also save the adapter every N steps; empty = at each quarter of the run; 0 = only at the end. "
        "A stopped run always saves what it has learnt.",
        json_schema_extra=_OUTPUT,
    )
    keep_last: int = Field(
        3, ge=1, description="How many of the adapters from save_every to keep.", json_schema_extra=_OUTPUT_MORE
    )
    snapshots: int = Field(
        0,
        ge=0,
        description="Also save the adapter after each of the last N steps, in the folder 'snapshots': what a generator "
        "of adapters learns from (studio generate train); 50 is plenty.",
        json_schema_extra=_OUTPUT_MORE,
    )
    checkpoint_every: int = Field(
        250,
        ge=0,
        description="Steps between checkpoints a run can be resumed from; 0 = only when cancelled.",
        json_schema_extra=_OUTPUT,
    )
    keep_checkpoints: int = Field(1, ge=1, description="How many checkpoints to keep.", json_schema_extra=_OUTPUT_MORE)
    save_dtype: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32", description="Precision of the saved adapter.", json_schema_extra=_OUTPUT_MORE
    )
    tracker: Literal["none", "tensorboard", "wandb", "mlflow", "comet_ml", "aim"] = Field(
        "none", description="Also log to this tracker.", json_schema_extra=_OUTPUT_MORE
    )

    @model_validator(mode="before")
    @classmethod
    def _start(cls, values: Any) -> Any:
        """Put the preset's values below those that are given."""
        if not isinstance(values, Mapping):
            return values
        base = values.get("base", cls.model_fields["base"].default if "base" in cls.model_fields else "")
        return {**presets.preset(cls.kind, str(values.get("preset") or ""), str(base)), **values}

    _file_name = field_validator("name")(rules.file_name)
    _positive_rate = field_validator("learning_rate")(rules.learning_rate)
    _valid_regex = field_validator("target_regex", "exclude_regex")(rules.regular_expression)


class AdapterTrainConfig(TrainConfig):
    """Additional fields of jobs that learn from a data set."""

    skip_broken: bool = Field(
        False, description="Leave out empty and unreadable pictures instead of stopping.", json_schema_extra=_DATA_MORE
    )
    rank_pattern: dict[str, int] = Field(
        default_factory=dict,
        description="Rank by module name pattern ('up_blocks.*attn2': 8).",
        json_schema_extra=_ADAPTER_MORE,
    )
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, description="Alpha by module name pattern.", json_schema_extra=_ADAPTER_MORE
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout in front of the low-rank pair.", json_schema_extra=_ADAPTER_MORE
    )
    use_rslora: bool = Field(
        False, description="Rank-stabilised scale: alpha / sqrt(rank).", json_schema_extra=_ADAPTER_MORE
    )
    use_dora: bool = Field(
        False, description="DoRA: direction and magnitude learn separately.", json_schema_extra=_ADAPTER_MORE
    )
    loraplus_ratio: float = Field(
        1.0, gt=0, description="LoRA+: learning rate of B over that of A.", json_schema_extra=_OPTIMISER_MORE
    )
    epochs: int | None = Field(
        None, ge=1, description="Passes over the data; when given, replaces steps.", json_schema_extra=_SCHEDULE
    )
    lr_cycles: int = Field(1, ge=1, description="cosine-restarts: how many restarts.", json_schema_extra=_SCHEDULE_MORE)
    lr_power: float = Field(1.0, gt=0, description="polynomial: the power.", json_schema_extra=_SCHEDULE_MORE)
    workers: int = Field(
        0,
        ge=0,
        description="Processes that read pictures when latents are not cached.",
        json_schema_extra=_MEMORY_MORE,
    )
    sample_at_start: bool = Field(
        False, description="Also draw samples before the first step.", json_schema_extra=_OUTPUT_MORE
    )
    validation_every: int = Field(
        50, ge=1, description="Validate every N steps, if pictures are held out.", json_schema_extra=_OUTPUT_MORE
    )
