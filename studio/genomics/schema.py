"""The configuration of a classification of transcripts."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from studio.schema import JobConfig

ADAPTER, BASE = "lncrna", "tinyrna"
"""The embedded adapter and its base."""


class ClassifyRnaConfig(JobConfig):
    """Tell two kinds of transcripts apart, for every record of a FASTA file."""

    kind: ClassVar[str] = "classify-rna"

    file: str = Field(min_length=1, description="FASTA file, plain or compressed (.gz, .bz2, .xz, .zst).")
    base: str = Field(BASE, description="K-mer model: name in the library or directory.")
    adapter: str = Field(
        ADAPTER, description="Adapter: name in the library or folder; empty = the base has a classifier of its own."
    )
    view: Literal["as-trained", "full", "orf", "both"] = Field(
        "as-trained", description="What of a transcript is read: all of it, its longest ORF, or both."
    )
    long: Literal["as-trained", "prefix", "windows"] = Field(
        "as-trained", description="What is read of a long transcript: its first part, or overlapping windows."
    )
    threshold: float | None = Field(
        None, gt=0, lt=1, description="The second label is given from this probability on; empty = as trained."
    )
    shortest: int = Field(100, ge=10, description="Shorter transcripts are left out (nt).")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps ...")
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = Field("auto", description="Precision of the weights.")
    batch_tokens: int = Field(8192, ge=64, description="Most tokens of a batch, padding included.")
