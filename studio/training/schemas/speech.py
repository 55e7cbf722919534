"""The speech training job: recordings with texts in, one ordinary PEFT adapter of a Whisper out.

Fields shared with a language training take their help and default from there.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from adapters.compression.backends import Quantization
from studio.training.schemas import combinations, rules
from studio.training.schemas.base import AdapterTrainConfig, LrSchedule, changed, option, preset_field
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.schemas.method import MethodFields

_MODEL = option("Model")
_MODEL_MORE = option("Model", advanced=True)
_DATA = option("Data")
_DATA_MORE = option("Data", advanced=True)
_OUTPUT_MORE = option("Samples and saving", advanced=True)
_same = partial(changed, TrainLanguageConfig)
"""A field of the language training, with changes."""


class TrainSpeechConfig(MethodFields, AdapterTrainConfig):
    """Train a LoRA of a Whisper from recordings with texts."""

    kind: ClassVar[str] = "train-speech"

    preset: str = preset_field(kind)

    # ---------------------------------------------------------------- Model
    base: str = Field(
        "whisper-tiny.en",
        description="Whisper: name in the library, directory or hub id.",
        json_schema_extra=_MODEL,
    )
    window: int | None = Field(
        None,
        ge=1,
        le=30,
        description="Seconds heard at a time; empty = the model's 30. Shorter is faster for short recordings, and the "
        "adapter is then used with the same window.",
        json_schema_extra=_MODEL_MORE,
    )
    quantization: Quantization = _same("quantization")
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = _same("dtype")
    device: str = _same("device")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = _same("attention")

    # ---------------------------------------------------------------- Data
    data: str = Field(
        description="Folder of recordings, each with a text of its name beside it (a.wav, a.txt) or with a file "
        "metadata.csv; or a file of rows (.jsonl, .csv, .tsv, .parquet) with audio and text; or hub id of a data set.",
        json_schema_extra=_DATA,
    )
    data_split: str = _same("data_split")
    validation_data: str = _same("validation_data", description="Folder, file or hub id of recordings to measure with.")
    validation_split: float = _same("validation_split", description="Share of the recordings held out for validation.")
    limit: int | None = _same("limit")
    skip_broken: bool = _same("skip_broken", description="Leave unreadable rows and sounds out instead of refusing.")
    audio_column: str = Field(
        "", description="Column of sounds; empty = 'audio', 'file_name', 'path' ...", json_schema_extra=_DATA_MORE
    )
    text_column: str = Field(
        "", description="Column of texts; empty = 'text', 'sentence', 'transcript' ...", json_schema_extra=_DATA_MORE
    )
    language: str = Field(
        "",
        description="Language of the texts, code or name; empty = English. English-only models need none.",
        json_schema_extra=_DATA,
    )
    task: Literal["transcribe", "translate"] = Field(
        "transcribe",
        description="What the texts are: what is said, or its English translation (multilingual models).",
        json_schema_extra=_DATA_MORE,
    )
    too_long: Literal["skip", "refuse"] = Field(
        "refuse",
        description="What to do with recordings longer than the window, or texts longer than the model writes.",
        json_schema_extra=_DATA_MORE,
    )

    # ---------------------------------------------------------------- Adapter
    rank: int = _same("rank")
    alpha: float | None = _same("alpha")
    targets: Literal["attention", "linear"] = _same(
        "targets",
        description="Layers that get an adapter, in encoder and decoder: attention projections, or every linear layer "
        "except the output.",
    )
    target_regex: str = _same("target_regex")
    exclude_regex: str = _same("exclude_regex")
    rank_pattern: dict[str, int] = _same("rank_pattern")
    continue_from: str = _same("continue_from")

    # ---------------------------------------------------------------- Optimiser and schedule
    learning_rate: float = _same("learning_rate", default=1e-3)
    weight_decay: float = _same("weight_decay")
    steps: int = _same("steps")
    batch_size: int = _same("batch_size", description="Recordings per forward pass and process.")
    lr_schedule: LrSchedule = changed(AdapterTrainConfig, "lr_schedule", default="linear")
    warmup_ratio: float = _same("warmup_ratio", default=0.1)
    workers: int = _same("workers")

    # ---------------------------------------------------------------- Samples and saving
    ema: bool = _same("ema")
    sample_prompts: list[str] = _same(
        "sample_prompts",
        description="Sound files written down during training. Empty = the first recordings (held-out ones if there "
        "are any).",
    )
    sample_every: int | None = _same("sample_every", description="Write them down every N steps; empty = four times "
                                     "over the run; 0 = only at the end.")  # fmt: skip
    sample_at_start: bool = _same("sample_at_start", description="Also before the first step.")
    validation_every: int = _same("validation_every", description="Measure every N steps, if recordings are held out.")
    validation_answers: int = Field(
        50,
        ge=0,
        description="How many held-out recordings are also written down, for the error rates.",
        json_schema_extra=_OUTPUT_MORE,
    )

    # ---------------------------------------------------------------- rules between fields
    @model_validator(mode="after")
    def _combinations(self) -> TrainSpeechConfig:
        rules.refuse(self, _REFUSED)
        combinations.refuse(self)
        return self


_REFUSED: list[rules.Refusal] = [
    (lambda c: not c.data.strip(), "name a folder, a file of rows or a hub id in data"),
    rules.one_held_out("recordings"),
]
