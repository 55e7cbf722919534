"""The classifier training job: pictures with labels in, one ordinary PEFT adapter (with its head) out.

Fields shared with a language training take their help and default from there.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from studio.training.schemas import combinations, rules
from studio.training.schemas.base import AdapterTrainConfig, changed, option
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.schemas.method import MethodFields, RegulariserFields

_MODEL = option("Model")
_DATA = option("Data")
_DATA_MORE = option("Data", advanced=True)
_same = partial(changed, TrainLanguageConfig)
"""A field of the language training, with changes."""


class TrainClassifierConfig(MethodFields, RegulariserFields, AdapterTrainConfig):
    """Train a LoRA of an image classifier (ViT, MLP-Mixer ...) from pictures with labels."""

    kind: ClassVar[str] = "train-classifier"

    base: str = Field(
        "emoji-vit",
        description="Image classifier: emoji-vit or emoji-mixer (embedded, 32 pixels), a directory or hub id of "
        "transformers, or timm's MLP-Mixer.",
        json_schema_extra=_MODEL,
    )
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = _same("dtype")
    device: str = _same("device")

    data: str = Field(
        description="File of rows (.jsonl, .json, .csv, .tsv) with image (a path beside the file) and label; tile, if "
        "the picture is a strip of squares.",
        json_schema_extra=_DATA,
    )
    data_split: str = _same("data_split")
    validation_data: str = _same("validation_data")
    validation_split: float = _same("validation_split")
    limit: int | None = _same("limit")
    skip_broken: bool = _same("skip_broken", description="Leave unreadable rows out instead of refusing the file.")
    labels: list[str] = Field(
        default_factory=list,
        description="All classes, in order; empty = the base's own if it knows every label of the data, else those of "
        "the data.",
        json_schema_extra=_DATA_MORE,
    )
    image_column: str = Field(
        "", description="Column of pictures; empty = 'image', 'image_path' ...", json_schema_extra=_DATA_MORE
    )
    label_column: str = _same("label_column", description="Column of labels; empty = 'label', 'class'.")

    rank: int = _same("rank")
    alpha: float | None = _same("alpha")
    targets: Literal["attention", "linear"] = _same("targets")
    target_regex: str = _same("target_regex")
    exclude_regex: str = _same("exclude_regex")
    rank_pattern: dict[str, int] = _same("rank_pattern")
    continue_from: str = _same("continue_from")
    learning_rate: float = _same("learning_rate", default=2e-3)
    weight_decay: float = _same("weight_decay")
    steps: int = _same("steps", default=200)
    batch_size: int = _same("batch_size", default=32, description="Pictures per forward pass and process.")
    warmup_ratio: float = _same("warmup_ratio", default=0.0)
    validation_every: int = _same("validation_every")

    @model_validator(mode="after")
    def _combinations(self) -> TrainClassifierConfig:
        rules.refuse(self, _REFUSED)
        combinations.refuse(self)
        return self


_REFUSED: list[rules.Refusal] = [
    (lambda c: not c.data.strip(), "name a file of rows in data"),
    rules.one_held_out("rows"),
    (lambda c: c.method != "lora", "experts are for language models: set method to 'lora'"),
    (lambda c: bool(c.labels) and len(set(c.labels)) < len(c.labels), "a label is named twice in labels"),
    (lambda c: bool(c.sample_prompts), "a classifier answers no prompts: leave sample_prompts empty"),
]
