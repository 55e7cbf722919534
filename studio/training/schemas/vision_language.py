"""The vision-language training job: pictures with questions and answers in, one ordinary PEFT adapter out.

Fields shared with a language training take their help and default from there.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from adapters.compression.backends import Quantization
from studio.training.schemas import combinations, rules
from studio.training.schemas.base import AdapterTrainConfig, changed, option, preset_field
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.schemas.method import MethodFields, RegulariserFields

_MODEL = option("Model")
_DATA = option("Data")
_DATA_MORE = option("Data", advanced=True)
_OUTPUT = option("Samples and saving")
_OUTPUT_MORE = option("Samples and saving", advanced=True)
_same = partial(changed, TrainLanguageConfig)
"""A field of the language training, with changes."""


class TrainVisionLanguageConfig(MethodFields, RegulariserFields, AdapterTrainConfig):
    """Train a LoRA of a vision-language model from pictures with questions and answers."""

    kind: ClassVar[str] = "train-vision-language"

    preset: str = preset_field(kind)

    # ---------------------------------------------------------------- Model
    base: str = Field(
        "tinysight",
        description="Vision-language model (LLaVA, Qwen2.5-VL, SmolVLM ...): name in the library, directory or hub id.",
        json_schema_extra=_MODEL,
    )
    quantization: Quantization = _same("quantization")
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = _same("dtype")
    device: str = _same("device")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = _same("attention")

    # ---------------------------------------------------------------- Data
    data: str = Field(
        description="File of rows (.jsonl, .json, .csv, .tsv, .parquet) with image, question and answer, or with "
        "messages; or hub id of a data set. Paths of pictures are relative to the file.",
        json_schema_extra=_DATA,
    )
    data_split: str = _same("data_split")
    validation_data: str = _same("validation_data")
    validation_split: float = _same("validation_split")
    limit: int | None = _same("limit")
    skip_broken: bool = _same("skip_broken", description="Leave unreadable rows and pictures out instead of refusing.")
    system_prompt: str = _same("system_prompt")
    image_column: str = Field(
        "",
        description="Column of pictures; empty = 'image', 'images', 'image_path', 'picture', 'file_name' ...",
        json_schema_extra=_DATA_MORE,
    )
    messages_column: str = _same("messages_column")
    question_column: str = _same("prompt_column", description="Column of questions; empty = 'question', 'prompt' ...")
    answer_column: str = _same("completion_column", description="Column of answers; empty = 'answer', 'completion' ...")
    max_length: int = _same(
        "max_length",
        default=2048,
        description="Maximum length of a sample in tokens, those of its pictures included; at most what the base "
        "reads.",
    )
    too_long: Literal["skip", "refuse"] = _same(
        "too_long", description="What to do with longer samples: skip or refuse them."
    )

    # ---------------------------------------------------------------- Adapter
    rank: int = _same("rank")
    alpha: float | None = _same("alpha")
    targets: Literal["attention", "linear"] = _same(
        "targets",
        description="Layers of the language model that get an adapter: attention projections, or every linear layer. "
        "The vision tower and the projector stay as they are.",
    )
    target_regex: str = _same("target_regex")
    exclude_regex: str = _same("exclude_regex")
    rank_pattern: dict[str, int] = _same("rank_pattern")
    continue_from: str = _same("continue_from")

    # ---------------------------------------------------------------- Optimiser and schedule
    learning_rate: float = _same("learning_rate")
    weight_decay: float = _same("weight_decay")
    steps: int = _same("steps")
    batch_size: int = _same("batch_size")
    warmup_ratio: float = _same("warmup_ratio")
    workers: int = _same("workers")

    # ---------------------------------------------------------------- Samples and saving
    ema: bool = _same("ema")
    sample_prompts: list[str] = _same(
        "sample_prompts",
        description="Questions answered during training, each 'PICTURE: QUESTION'. Empty = the first rows "
        "(held-out ones if there are any).",
    )
    sample_every: int | None = _same("sample_every")
    sample_at_start: bool = _same("sample_at_start")
    sample_tokens: int = _same("sample_tokens", description="Longest answer (tokens).")
    validation_every: int = _same("validation_every")
    validation_answers: int = Field(
        50,
        ge=0,
        description="How many held-out rows are also answered in words, for the share of exact answers.",
        json_schema_extra=_OUTPUT_MORE,
    )

    # ---------------------------------------------------------------- rules between fields
    @model_validator(mode="after")
    def _combinations(self) -> TrainVisionLanguageConfig:
        rules.refuse(self, _REFUSED)
        combinations.refuse(self)
        return self


_REFUSED: list[rules.Refusal] = [
    (lambda c: not c.data.strip(), "name a file of rows (or a hub id) in data"),
    rules.one_held_out("rows"),
    (
        lambda c: any(": " not in prompt for prompt in c.sample_prompts),
        "a sample prompt is 'PICTURE: QUESTION' (cat.png: What is it?)",
    ),
]
