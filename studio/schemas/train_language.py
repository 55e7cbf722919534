"""The language training job: rows of text in, one ordinary PEFT adapter out.

Flat like the image schema: one field is one YAML key, one command line flag and one widget.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from studio.schemas import combinations
from studio.schemas.base import JobConfig
from studio.schemas.method import MethodFields, RegulariserFields

Task = Literal["causal", "classification", "masked"]
Optimizer = Literal["adamw", "adamw8bit", "adafactor", "sgd", "prodigy", "schedulefree-adamw"]
LrSchedule = Literal["constant", "linear", "cosine", "cosine-restarts", "polynomial"]


def _option(group: str, advanced: bool = False) -> dict[str, Any]:
    return {"group": group, "advanced": advanced}


_MODEL = _option("Model")
_MODEL_MORE = _option("Model", advanced=True)
_DATA = _option("Data")
_DATA_MORE = _option("Data", advanced=True)
_ADAPTER = _option("Adapter")
_ADAPTER_MORE = _option("Adapter", advanced=True)
_OPTIMISER = _option("Optimiser")
_OPTIMISER_MORE = _option("Optimiser", advanced=True)
_SCHEDULE = _option("Schedule")
_SCHEDULE_MORE = _option("Schedule", advanced=True)
_MEMORY = _option("Memory and speed")
_MEMORY_MORE = _option("Memory and speed", advanced=True)
_OUTPUT = _option("Samples and saving")
_OUTPUT_MORE = _option("Samples and saving", advanced=True)


class TrainLanguageConfig(MethodFields, RegulariserFields, JobConfig):
    """Train a LoRA of a language model from rows of text."""

    kind: ClassVar[str] = "train-language"

    # ---------------------------------------------------------------- Model
    base: str = Field(
        "smollm2",
        description="Language model: name in the library, directory or hub id (smollm2 = SmolLM2-135M-Instruct).",
        json_schema_extra=_MODEL,
    )
    quantization: Literal["none", "4bit", "8bit"] = Field(
        "none",
        description="QLoRA: keep the frozen base in 4 or 8 bits (needs bitsandbytes).",
        json_schema_extra=_MODEL,
    )
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="Precision of the frozen weights.", json_schema_extra=_MODEL_MORE
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps ...", json_schema_extra=_MODEL_MORE)
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="Attention backend.", json_schema_extra=_MODEL_MORE
    )

    # ---------------------------------------------------------------- Data
    name: str = Field("adapter", description="Name of the adapter that is made.", json_schema_extra=_DATA)
    task: Task = Field(
        "causal",
        description="causal: learn to answer or to write; classification: tell labels apart; masked: fill gaps (BERT).",
        json_schema_extra=_DATA,
    )
    data: str = Field(
        description="File of rows (.jsonl, .json, .csv, .tsv, .parquet, .txt) or hub id of a data set.",
        json_schema_extra=_DATA,
    )
    data_split: str = Field("train", description="Split of a hub data set.", json_schema_extra=_DATA_MORE)
    validation_data: str = Field(
        "", description="File or hub id of rows to measure with, never trained on.", json_schema_extra=_DATA_MORE
    )
    validation_split: float = Field(
        0.0, ge=0, lt=1, description="Share of the rows kept out to measure with.", json_schema_extra=_DATA
    )
    limit: int | None = Field(
        None, ge=1, description="Use the first so many rows only; empty = all.", json_schema_extra=_DATA_MORE
    )
    skip_broken: bool = Field(
        False, description="Leave unreadable rows out instead of refusing the file.", json_schema_extra=_DATA_MORE
    )
    system_prompt: str = Field(
        "", description="System message put before conversations that have none.", json_schema_extra=_DATA
    )
    chat_template: str = Field(
        "",
        description="Chat template for bases without one: 'chatml' or a Jinja file. Empty = the base's own.",
        json_schema_extra=_DATA_MORE,
    )
    messages_column: str = Field(
        "", description="Column of conversations; empty = 'messages' or 'conversations'.", json_schema_extra=_DATA_MORE
    )
    prompt_column: str = Field(
        "", description="Column of prompts; empty = 'prompt', 'instruction', 'question'.", json_schema_extra=_DATA_MORE
    )
    completion_column: str = Field(
        "",
        description="Column of answers; empty = 'completion', 'output', 'response', 'answer'.",
        json_schema_extra=_DATA_MORE,
    )
    text_column: str = Field(
        "", description="Column of plain texts; empty = 'text', 'sentence'.", json_schema_extra=_DATA_MORE
    )
    label_column: str = Field(
        "", description="classification: column of labels; empty = 'label', 'class'.", json_schema_extra=_DATA_MORE
    )
    max_length: int = Field(512, ge=2, description="Longest sample in tokens.", json_schema_extra=_DATA)
    too_long: Literal["skip", "cut", "refuse"] = Field(
        "skip",
        description="Longer conversations: leave out, cut the end off, or refuse. Plain texts become several samples.",
        json_schema_extra=_DATA_MORE,
    )
    loss_on: Literal["completion", "all"] = Field(
        "completion",
        description="causal: learn the answers only, or every token.",
        json_schema_extra=_DATA,
    )
    packing: bool = Field(
        False,
        description="causal: several short samples share one row of max_length, kept apart by attention; "
        "faster, and batch_size then counts rows.",
        json_schema_extra=_DATA,
    )
    mask_share: float = Field(
        0.15, gt=0, lt=1, description="masked: share of tokens to guess.", json_schema_extra=_DATA_MORE
    )

    # ---------------------------------------------------------------- Adapter
    rank: int = Field(8, ge=1, description="Rank of the low-rank pair.", json_schema_extra=_ADAPTER)
    alpha: float | None = Field(
        None, gt=0, description="Numerator of the scale alpha / rank; empty = rank.", json_schema_extra=_ADAPTER_MORE
    )
    targets: Literal["attention", "linear"] = Field(
        "linear",
        description="Layers that get an adapter: attention projections, or every linear layer except the head.",
        json_schema_extra=_ADAPTER,
    )
    target_regex: str = Field(
        "", description="Instead: regular expression over whole module names.", json_schema_extra=_ADAPTER_MORE
    )
    exclude_regex: str = Field(
        "", description="Leave out modules whose whole name matches.", json_schema_extra=_ADAPTER_MORE
    )
    rank_pattern: dict[str, int] = Field(
        default_factory=dict, description="Rank by module name pattern.", json_schema_extra=_ADAPTER_MORE
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
    continue_from: str = Field(
        "",
        description="Start from this adapter (library name or folder) instead of from zero.",
        json_schema_extra=_ADAPTER_MORE,
    )

    # ---------------------------------------------------------------- Optimiser
    optimizer: Optimizer = Field("adamw", description="Optimiser.", json_schema_extra=_OPTIMISER)
    learning_rate: float = Field(
        2e-4, description="Learning rate (prodigy: a factor, use 1).", json_schema_extra=_OPTIMISER
    )
    loraplus_ratio: float = Field(
        1.0, gt=0, description="LoRA+: learning rate of B over that of A.", json_schema_extra=_OPTIMISER_MORE
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.", json_schema_extra=_OPTIMISER_MORE)
    beta1: float = Field(
        0.9, ge=0, lt=1, description="First moment decay (momentum of sgd).", json_schema_extra=_OPTIMISER_MORE
    )
    beta2: float = Field(0.999, ge=0, lt=1, description="Second moment decay.", json_schema_extra=_OPTIMISER_MORE)
    epsilon: float = Field(1e-8, gt=0, description="Added to the denominator.", json_schema_extra=_OPTIMISER_MORE)
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are clipped to this norm; 0 = not.", json_schema_extra=_OPTIMISER_MORE
    )
    neftune_alpha: float | None = Field(
        None,
        gt=0,
        description="NEFTune: noise on the embeddings while training (5 is usual); empty = none.",
        json_schema_extra=_OPTIMISER_MORE,
    )
    seed: int = Field(0, ge=0, description="Start of every random number of the run.", json_schema_extra=_OPTIMISER)

    # ---------------------------------------------------------------- Schedule
    steps: int = Field(300, ge=1, description="Optimiser steps.", json_schema_extra=_SCHEDULE)
    epochs: int | None = Field(
        None, ge=1, description="Passes over the data; when given, replaces steps.", json_schema_extra=_SCHEDULE
    )
    batch_size: int = Field(8, ge=1, description="Samples per forward pass and process.", json_schema_extra=_SCHEDULE)
    gradient_accumulation: int = Field(
        1, ge=1, description="Forward passes per optimiser step.", json_schema_extra=_SCHEDULE
    )
    lr_schedule: LrSchedule = Field(
        "cosine", description="How the learning rate moves after the warm-up.", json_schema_extra=_SCHEDULE
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.", json_schema_extra=_SCHEDULE_MORE)
    warmup_ratio: float = Field(
        0.03,
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
    lr_cycles: int = Field(1, ge=1, description="cosine-restarts: how many.", json_schema_extra=_SCHEDULE_MORE)
    lr_power: float = Field(1.0, gt=0, description="polynomial: the power.", json_schema_extra=_SCHEDULE_MORE)

    # ---------------------------------------------------------------- Memory and speed
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute instead of remembering: less memory, about a third more time.",
        json_schema_extra=_MEMORY,
    )
    tf32: bool = Field(True, description="Fast fp32 products on Nvidia GPUs.", json_schema_extra=_MEMORY_MORE)
    workers: int = Field(0, ge=0, description="Processes that prepare batches.", json_schema_extra=_MEMORY_MORE)

    # ---------------------------------------------------------------- Samples and saving
    sample_prompts: list[str] = Field(
        default_factory=list,
        description="Questions (causal) or texts (classification, masked) answered during training.",
        json_schema_extra=_OUTPUT,
    )
    sample_every: int = Field(
        0, ge=0, description="Answer them every so many steps; 0 = only at the end.", json_schema_extra=_OUTPUT
    )
    sample_at_start: bool = Field(False, description="Also before the first step.", json_schema_extra=_OUTPUT_MORE)
    sample_tokens: int = Field(48, ge=1, description="Most tokens of a sample answer.", json_schema_extra=_OUTPUT_MORE)
    validation_every: int = Field(
        50, ge=1, description="Steps between measurements, when rows are kept out.", json_schema_extra=_OUTPUT_MORE
    )
    checkpoint_every: int = Field(
        250,
        ge=0,
        description="Steps between checkpoints a run can be resumed from; 0 = only when cancelled.",
        json_schema_extra=_OUTPUT,
    )
    keep_checkpoints: int = Field(1, ge=1, description="How many checkpoints are kept.", json_schema_extra=_OUTPUT_MORE)
    save_dtype: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32", description="Precision of the saved adapter.", json_schema_extra=_OUTPUT_MORE
    )
    tracker: Literal["none", "tensorboard", "wandb", "mlflow", "comet_ml", "aim"] = Field(
        "none", description="Also log to this tracker.", json_schema_extra=_OUTPUT_MORE
    )

    # ---------------------------------------------------------------- rules between fields
    @field_validator("name")
    @classmethod
    def _file_name(cls, value: str) -> str:
        if not re.fullmatch(r"[\w][\w .+-]*", value):
            raise ValueError("a name has letters, digits, spaces and . _ + - only, and starts with a letter or digit")
        return value

    @field_validator("learning_rate")
    @classmethod
    def _positive_rate(cls, value: float) -> float:
        if not (math.isfinite(value) and value > 0):
            raise ValueError("a learning rate must be a finite number above 0")
        return value

    @field_validator("target_regex", "exclude_regex")
    @classmethod
    def _valid_regex(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _combinations(self) -> TrainLanguageConfig:
        for broken, sentence in _REFUSED:
            if broken(self):
                raise ValueError(sentence)
        refused = combinations.refusal(self)
        if refused:
            raise ValueError(refused)
        return self


_REFUSED: list[tuple[Any, str]] = [
    (lambda c: not c.data.strip(), "name a file of rows (or a hub id) in data"),
    (
        lambda c: c.packing and c.task != "causal",
        "packing is for the causal task: switch it off",
    ),
    (
        lambda c: bool(c.validation_data) and c.validation_split > 0,
        "rows to measure with come from validation_data or from validation_split, not from both",
    ),
    (
        lambda c: c.task != "causal" and c.system_prompt,
        "a system prompt belongs to conversations (task causal): leave system_prompt empty",
    ),
    (
        lambda c: c.quantization != "none" and c.task == "masked",
        "quantized bases are for the causal and classification tasks: set quantization to 'none'",
    ),
]
