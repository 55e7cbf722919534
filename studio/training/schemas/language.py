"""The language training job: rows of text in, one ordinary PEFT adapter out.

Flat like the image schema: one field is one YAML key, one command line flag and one widget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from adapters.compression.backends import Quantization
from studio.training.language.about import known
from studio.training.schemas import combinations, rules
from studio.training.schemas.base import AdapterTrainConfig, changed, option, preset_field
from studio.training.schemas.method import MethodFields, RegulariserFields

if TYPE_CHECKING:
    Task = str
else:
    Task = Literal[tuple(known())]

_MODEL = option("Model")
_MODEL_MORE = option("Model", advanced=True)
_DATA = option("Data")
_DATA_MORE = option("Data", advanced=True)
_ADAPTER = option("Adapter")
_ADAPTER_MORE = option("Adapter", advanced=True)
_OPTIMISER = option("Optimiser")
_OPTIMISER_MORE = option("Optimiser", advanced=True)
_SCHEDULE = option("Schedule")
_SCHEDULE_MORE = option("Schedule", advanced=True)
_MEMORY = option("Memory and speed")
_MEMORY_MORE = option("Memory and speed", advanced=True)
_OUTPUT = option("Samples and saving")
_OUTPUT_MORE = option("Samples and saving", advanced=True)


class TrainLanguageConfig(MethodFields, RegulariserFields, AdapterTrainConfig):
    """Train a LoRA of a language model from rows of text."""

    kind: ClassVar[str] = "train-language"

    preset: str = preset_field(kind)

    # ---------------------------------------------------------------- Model
    base: str = Field(
        "smollm2",
        description="Language model: name in the library, directory or hub id (smollm2 = SmolLM2-135M-Instruct).",
        json_schema_extra=_MODEL,
    )
    quantization: Quantization = Field(
        "none",
        description="QLoRA: keep the frozen base in few bits: 8bit, 4bit (bitsandbytes), int8, int4 (torchao).",
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
    task: Task = Field(
        "causal",
        description="; ".join(f"{about.name}: {about.summary}" for about in known().values()) + ".",
        json_schema_extra=_DATA,
    )
    data: str = Field(
        description="File of rows (.jsonl, .json, .csv, .tsv, .parquet, .txt) or hub id of a data set.",
        json_schema_extra=_DATA,
    )
    data_split: str = Field("train", description="Split of a hub data set.", json_schema_extra=_DATA_MORE)
    validation_data: str = Field(
        "", description="File or hub id of validation rows, never trained on.", json_schema_extra=_DATA_MORE
    )
    validation_split: float = Field(
        0.0, ge=0, lt=1, description="Share of the rows held out for validation.", json_schema_extra=_DATA
    )
    limit: int | None = Field(
        None, ge=1, description="Use only the first N rows; empty = all.", json_schema_extra=_DATA_MORE
    )
    skip_broken: bool = changed(
        AdapterTrainConfig, "skip_broken", description="Leave unreadable rows out instead of refusing the file."
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
    max_length: int = Field(512, ge=2, description="Maximum length of a sample, in tokens.", json_schema_extra=_DATA)
    too_long: Literal["skip", "cut", "refuse"] = Field(
        "skip",
        description="What to do with longer conversations: skip, cut or refuse. Plain texts become several samples.",
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
        0.15, gt=0, lt=1, description="masked: share of tokens that are hidden.", json_schema_extra=_DATA_MORE
    )

    # ---------------------------------------------------------------- Adapter
    rank: int = changed(AdapterTrainConfig, "rank", default=8, description="Rank of the low-rank pair.")
    alpha: float | None = Field(
        None, gt=0, description="The update is scaled by alpha / rank. Empty = rank.", json_schema_extra=_ADAPTER_MORE
    )
    targets: Literal["attention", "linear"] = Field(
        "linear",
        description="Layers that get an adapter: attention projections, or every linear layer except the head.",
        json_schema_extra=_ADAPTER,
    )
    target_regex: str = changed(
        AdapterTrainConfig, "target_regex", description="Instead of a preset: regular expression of whole module names."
    )
    exclude_regex: str = changed(
        AdapterTrainConfig, "exclude_regex", description="Regular expression of module names that stay untouched."
    )
    rank_pattern: dict[str, int] = changed(
        AdapterTrainConfig, "rank_pattern", description="Rank by module name pattern."
    )
    continue_from: str = changed(
        AdapterTrainConfig,
        "continue_from",
        description="Start from this adapter (library name or folder) instead of from zero.",
    )

    # ---------------------------------------------------------------- Optimiser
    learning_rate: float = changed(AdapterTrainConfig, "learning_rate", default=2e-4)
    weight_decay: float = changed(AdapterTrainConfig, "weight_decay", default=0.0)
    neftune_alpha: float | None = Field(
        None,
        gt=0,
        description="NEFTune: noise on the embeddings while training (5 is usual); empty = none.",
        json_schema_extra=_OPTIMISER_MORE,
    )

    # ---------------------------------------------------------------- Schedule
    steps: int = changed(AdapterTrainConfig, "steps", default=300)
    batch_size: int = changed(
        AdapterTrainConfig, "batch_size", default=8, description="Samples per forward pass and process."
    )
    warmup_ratio: float = changed(AdapterTrainConfig, "warmup_ratio", default=0.03)

    # ---------------------------------------------------------------- Memory and speed
    workers: int = changed(AdapterTrainConfig, "workers", description="Processes that prepare batches.")

    # ---------------------------------------------------------------- Samples and saving
    ema: bool = changed(
        AdapterTrainConfig, "ema", description="Save (and answer with) a running average of the adapter."
    )
    sample_prompts: list[str] = changed(
        AdapterTrainConfig,
        "sample_prompts",
        description="Questions (causal) or texts (classification, masked) answered during training.",
    )
    sample_every: int | None = changed(
        AdapterTrainConfig,
        "sample_every",
        description="Answer them every N steps; empty = four times over the run; 0 = only at the end.",
    )
    sample_at_start: bool = changed(
        AdapterTrainConfig, "sample_at_start", description="Also answer before the first step."
    )
    sample_tokens: int = Field(48, ge=1, description="Longest sample answer (tokens).", json_schema_extra=_OUTPUT_MORE)
    validation_every: int = changed(
        AdapterTrainConfig, "validation_every", description="Measure every N steps, if rows are held out."
    )

    # ---------------------------------------------------------------- rules between fields
    @model_validator(mode="after")
    def _combinations(self) -> TrainLanguageConfig:
        rules.refuse(self, _REFUSED)
        combinations.refuse(self)
        return self


_REFUSED: list[rules.Refusal] = [
    (lambda c: not c.data.strip(), "name a file of rows (or a hub id) in data"),
    (
        lambda c: c.packing and c.task != "causal",
        "packing is for the causal task: switch it off",
    ),
    rules.one_held_out("rows"),
    (
        lambda c: c.task != "causal" and c.system_prompt,
        "a system prompt belongs to conversations (task causal): leave system_prompt empty",
    ),
    (
        lambda c: c.quantization != "none" and c.task == "masked",
        "quantized bases are for the causal and classification tasks: set quantization to 'none'",
    ),
    (
        lambda c: c.snapshots and c.method != "lora",
        "snapshots are for a generator of adapters, which learns from plain LoRAs: set method to 'lora'",
    ),
]
