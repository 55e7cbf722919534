"""The RNA training job: transcripts in, a k-mer model or an adapter of one out.

Fields shared with a language training take their help and default from there.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from studio.training.schemas import combinations, rules
from studio.training.schemas.base import AdapterTrainConfig, changed, option, preset_field
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.schemas.method import MethodFields, RegulariserFields

NEW = "new"
"""The base of a model that is trained from scratch."""

_MODEL = option("Model")
_MODEL_MORE = option("Model", advanced=True)
_DATA = option("Data")
_DATA_MORE = option("Data", advanced=True)
_ADAPTER = option("Adapter")
_same = partial(changed, TrainLanguageConfig)
"""A field of the language training, with changes."""


class TrainRnaConfig(MethodFields, RegulariserFields, AdapterTrainConfig):
    """Train a k-mer model of RNA, or a LoRA of one."""

    kind: ClassVar[str] = "train-rna"
    quantization: ClassVar[str] = "none"

    preset: str = preset_field(kind)

    # ---------------------------------------------------------------- Model
    base: str = Field(
        "tinyrna",
        description="K-mer model (DNABERT, LoRA-BERT ...): name in the library or directory; 'new' = an untrained BERT "
        "of the size below, with mode full.",
        json_schema_extra=_MODEL,
    )
    mode: Literal["lora", "full"] = Field(
        "lora",
        description="lora: a small adapter of the frozen base. full: every weight learns, as in the paper LoRA-BERT, "
        "and the result is a whole model.",
        json_schema_extra=_MODEL,
    )
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = _same("dtype")
    device: str = _same("device")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = _same("attention")
    k: int = Field(3, ge=2, le=8, description="base new: letters of a token.", json_schema_extra=_MODEL_MORE)
    stride: int = Field(
        1,
        ge=1,
        le=8,
        description="base new: letters between tokens; k = tokens do not overlap, k times as much is read, and every "
        "transcript is learnt in each of its frames.",
        json_schema_extra=_MODEL_MORE,
    )
    width: int = Field(768, ge=4, description="base new: width of the model.", json_schema_extra=_MODEL_MORE)
    depth: int = Field(12, ge=1, description="base new: layers.", json_schema_extra=_MODEL_MORE)
    heads: int = Field(12, ge=1, description="base new: attention heads.", json_schema_extra=_MODEL_MORE)

    # ---------------------------------------------------------------- Data
    task: Literal["classification", "masked"] = Field(
        "classification",
        description="classification: tell two kinds of transcripts apart. masked: predict hidden k-mers "
        "(pre-training; needs no labels).",
        json_schema_extra=_DATA,
    )
    data: list[str] = Field(
        min_length=1,
        description="FASTA files, plain or compressed; 'LABEL=FILE' when a file holds one class (lncRNA=nc.fa.gz).",
        json_schema_extra=_DATA,
    )
    labels_file: str = Field(
        "",
        description="Table (.tsv, .csv) with the columns id, label and perhaps gene; empty = the headers say "
        "label=... and gene=...",
        json_schema_extra=_DATA,
    )
    labels: list[str] = Field(
        ["mRNA", "lncRNA"],
        min_length=2,
        max_length=2,
        description="The two labels; probabilities are about the second.",
        json_schema_extra=_DATA_MORE,
    )
    validation_data: list[str] = Field(
        default_factory=list,
        description="FASTA files to measure with, in the form of data, never trained on.",
        json_schema_extra=_DATA_MORE,
    )
    validation_split: float = _same(
        "validation_split", description="Share of the genes held out for validation, of both labels."
    )
    limit: int | None = _same("limit", description="Use only the first N transcripts of each file; empty = all.")
    shortest: int = Field(
        100, ge=10, description="Shorter transcripts are left out (nt).", json_schema_extra=_DATA_MORE
    )
    view: Literal["full", "orf", "both"] = Field(
        "both",
        description="What of a transcript is read: all of it, its longest ORF, or both as two rows (as in the paper).",
        json_schema_extra=_DATA,
    )
    strands: Literal["forward", "both"] = Field(
        "forward",
        description="Where ORFs are searched; both strands as in the paper, which is wrong for stranded RNA.",
        json_schema_extra=_DATA_MORE,
    )
    long: Literal["prefix", "windows"] = Field(
        "prefix",
        description="What is read of a transcript longer than max_length: its first part, or overlapping windows.",
        json_schema_extra=_DATA,
    )
    max_length: int | None = Field(
        None,
        ge=8,
        description="Tokens of one input; empty = what the base reads, for a new model 1536 (as in the paper).",
        json_schema_extra=_DATA,
    )
    train_positions: bool = Field(
        False,
        description="lora: let max_length exceed the base's positions; new ones learn as a whole and are saved with "
        "the adapter.",
        json_schema_extra=_DATA_MORE,
    )
    balance: bool = Field(
        True,
        description="classification: repeat rows of the rarer label until both are equally frequent.",
        json_schema_extra=_DATA,
    )
    threshold: float = Field(
        0.5, gt=0, lt=1, description="The second label is given from this probability on.", json_schema_extra=_DATA_MORE
    )
    mask_share: float = _same(
        "mask_share", description="masked: share of k-mers that are hidden, in spans where they overlap."
    )
    skip_broken: ClassVar[bool] = False  # type: ignore[misc]

    # ---------------------------------------------------------------- Adapter
    rank: int = _same("rank")
    alpha: float | None = changed(AdapterTrainConfig, "alpha", default=16)
    dropout: float = changed(AdapterTrainConfig, "dropout", default=0.05)
    targets: Literal["query-value", "attention", "linear"] = Field(
        "query-value",
        description="Layers that get an adapter: queries and values, all attention projections, or every linear layer. "
        "Pooler and classifier learn as a whole.",
        json_schema_extra=_ADAPTER,
    )
    target_regex: str = _same("target_regex")
    exclude_regex: str = _same("exclude_regex")
    rank_pattern: dict[str, int] = _same("rank_pattern")
    continue_from: str = _same("continue_from")

    # ---------------------------------------------------------------- Optimiser and schedule
    learning_rate: float = _same("learning_rate", default=3e-4)
    weight_decay: float = _same("weight_decay")
    steps: int = _same("steps")
    batch_size: int = changed(
        AdapterTrainConfig, "batch_size", default=16, description="Rows per forward pass and process."
    )
    warmup_ratio: float = _same("warmup_ratio")
    workers: int = _same("workers")

    # ---------------------------------------------------------------- Samples and saving
    ema: bool = changed(AdapterTrainConfig, "ema", description="Save a running average of what is learnt.")
    sample_prompts: list[str] = changed(
        AdapterTrainConfig, "sample_prompts", description="classification: nucleotides classified during training."
    )
    sample_every: int | None = _same("sample_every")
    sample_at_start: bool = _same("sample_at_start")
    validation_every: int = changed(
        AdapterTrainConfig, "validation_every", description="Measure every N steps, if transcripts are held out."
    )

    # ---------------------------------------------------------------- rules between fields
    @model_validator(mode="after")
    def _combinations(self) -> TrainRnaConfig:
        rules.refuse(self, _REFUSED)
        if self.mode == "full" and (named := _adapter_choice(self)):
            raise ValueError(
                f"mode full trains every weight and has no adapter: leave {named} as it is, or choose mode lora"
            )
        combinations.refuse(self)
        return self


def _adapter_choice(config: TrainRnaConfig) -> str:
    """The first field about adapters that is not as usual; empty if there is none."""
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        group = extra.get("group") if isinstance(extra, dict) else ""
        about = group in ("Adapter", "Method") or name in ("loraplus_ratio", "train_positions")
        if about and getattr(config, name) != field.get_default(call_default_factory=True):
            return name
    return ""


_REFUSED: list[rules.Refusal] = [
    (lambda c: not all(place.strip() for place in c.data), "name a FASTA file in data"),
    rules.one_held_out("transcripts"),
    (lambda c: c.labels[0] == c.labels[1] or not all(c.labels), "the two labels must differ and have names"),
    (
        lambda c: c.base == NEW and c.mode == "lora",
        "an untrained model has nothing to keep frozen: choose mode full, or a base that has learnt",
    ),
    (lambda c: c.base == NEW and c.width % c.heads, "the width of a new model must be a multiple of its heads"),
    (lambda c: c.base == NEW and c.stride > c.k, "with a stride above k letters would never be read"),
    (
        lambda c: c.task == "masked" and c.sample_prompts,
        "sample prompts are classified: leave sample_prompts empty with task masked",
    ),
    (
        lambda c: c.task == "masked" and c.labels_file,
        "task masked learns without labels: leave labels_file empty",
    ),
]
