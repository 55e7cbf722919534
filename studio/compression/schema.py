"""Configurations of the compression jobs."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from studio.schema import JobConfig

_MAIN: dict[str, Any] = {"group": "Model", "advanced": False}
_DATA: dict[str, Any] = {"group": "Data", "advanced": False}
_MORE: dict[str, Any] = {"group": "Rarely needed", "advanced": True}


class CompressConfig(JobConfig):
    """What every compression has."""

    base: str = Field(min_length=1, description="Language model: name in the library, or directory.")
    name: str = Field(
        "", description="Name of the new base in the library; empty = base and method.",
        json_schema_extra=_MAIN,
    )  # fmt: skip


class RowsFields(CompressConfig):
    """Rows that say what matters."""

    data: str = Field(
        "", description="Rows of text as for training (.jsonl, ...): what matters for them is kept best.",
        json_schema_extra=_DATA,
    )  # fmt: skip
    samples: int = Field(128, ge=1, description="At most so many rows are looked at.", json_schema_extra=_DATA)
    max_length: int = Field(512, ge=2, description="Tokens of a row that are looked at.", json_schema_extra=_DATA)
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps ...", json_schema_extra=_MORE)
    seed: int = Field(0, ge=0, description="Of everything random.", json_schema_extra=_MORE)


class CompressLqConfig(RowsFields):
    """Few-bit matrices with a low-rank part (LQ-LoRA)."""

    kind: ClassVar[str] = "compress-lq"

    bits: float = Field(
        2.75, gt=0, description="Bits per weight of the matrices, their scales included.",
        json_schema_extra=_MAIN,
    )  # fmt: skip
    fit: float | None = Field(
        None, gt=0, description="Instead of bits: files of at most so many GB altogether.",
        json_schema_extra=_MAIN,
    )  # fmt: skip
    rank: int = Field(
        64, ge=0, description="Rank of the low-rank part that absorbs the error; 0 = none.",
        json_schema_extra=_MAIN,
    )  # fmt: skip
    steps: int = Field(
        20, ge=1, description="At most so many turns of singular values and quantising per matrix.",
        json_schema_extra=_MORE,
    )  # fmt: skip
    uniform: Literal["", "nf2", "nf3", "nf4"] = Field(
        "", description="The same for every matrix (scales as in QLoRA) instead of a choice within the budget.",
        json_schema_extra=_MORE,
    )  # fmt: skip
    thorough: bool = Field(
        False, description="Choose among all 432 configurations of the paper instead of 48.", json_schema_extra=_MORE
    )
    search: Literal["first", "full"] = Field(
        "first", description="Compare configurations by the first turn, or by all (much slower).",
        json_schema_extra=_MORE,
    )  # fmt: skip
    padding: bool = Field(
        False, description="Allow blocks that a matrix does not fill (the bytes count them).", json_schema_extra=_MORE
    )
    solver_seconds: float = Field(60, gt=0, description="Time limit of the integer program.", json_schema_extra=_MORE)


class CompressL4qConfig(CompressConfig):
    """The integer base of an adapter trained through the rounding (L4Q)."""

    kind: ClassVar[str] = "compress-l4q"

    adapter: str = Field(
        min_length=1, description="Adapter trained with l4q_bits: name in the library, or folder.",
        json_schema_extra=_MAIN,
    )  # fmt: skip
