"""Configurations of the jobs on generated adapters: training a generator, and making adapters with it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from adapters.generation.settings import Arch, Gauge, Normalise, Settings
from studio.schema import JobConfig

_OWN = Settings()
_VECTORS: dict[str, Any] = {"group": "Task vectors"}
_MORE: dict[str, Any] = {"advanced": True}


class GenerateTrainConfig(JobConfig):
    """Learn a generator from snapshots of several tasks' adapters (ICM-LoRA)."""

    kind: ClassVar[str] = "generate-train"

    name: str = Field("generator", min_length=1, description="Name of the generator's file.")
    snapshots: dict[str, str] = Field(
        min_length=1, description="Task -> folder with its snapshots, one adapter per file or folder; repeatable."
    )
    examples: dict[str, str] = Field(
        {}, json_schema_extra=_VECTORS,
        description="Task -> text file with one example per line, from which the base makes its vector; repeatable.",
    )  # fmt: skip
    vectors: dict[str, str] = Field(
        {}, description="Task -> .safetensors file with its vector, instead of examples.", json_schema_extra=_VECTORS
    )
    base: str = Field("", description="The base that makes the vectors: name in the library, folder or hub id.")
    limit: int = Field(30, ge=1, description="Use at most so many examples of a task.", json_schema_extra=_VECTORS)
    layer: int = Field(-1, description="Hidden state of the vectors; -1 is the last.", json_schema_extra=_VECTORS)
    position: Literal["last", "mean"] = Field(
        "last", description="The last token's hidden state, or the mean over all tokens.", json_schema_extra=_VECTORS
    )
    shots: int = Field(
        0, ge=0, description="How many other examples stand before each one.", json_schema_extra=_VECTORS
    )

    steps: int = Field(_OWN.steps, ge=1, description="Training steps.")
    batch: int = Field(_OWN.batch, ge=2, description="Snapshots per step.")
    learning_rate: float = Field(_OWN.learning_rate, gt=0, allow_inf_nan=False, description="Of AdamW, at the start.")
    seed: int = Field(_OWN.seed, ge=0, description="Seed of the training.")
    arch: Arch = Field(_OWN.arch, description="mlp for small adapters; conv is the paper's, and slow to learn.")
    latent: int = Field(_OWN.latent, ge=1, description="Width of the latent variable.", json_schema_extra=_MORE)
    hidden: int = Field(_OWN.hidden, ge=1, description="Width of mlp's hidden layers.", json_schema_extra=_MORE)
    kld_weight: float = Field(
        _OWN.kld_weight, ge=0, allow_inf_nan=False, description="Weight of the KL term.", json_schema_extra=_MORE
    )
    free_bits: float = Field(
        _OWN.free_bits, ge=0, allow_inf_nan=False, description="KL per latent entry that costs nothing (nats).",
        json_schema_extra=_MORE,
    )  # fmt: skip
    warm_up: int = Field(
        _OWN.warm_up, ge=0, description="Steps over which the KL's weight rises.", json_schema_extra=_MORE
    )
    normalise: Normalise = Field(
        _OWN.normalise, json_schema_extra=_MORE,
        description="Statistics of all snapshots (dataset), or the paper's, which need a reference adapter later.",
    )  # fmt: skip
    gauge: Gauge = Field(
        _OWN.gauge, description="What order, signs and scales of rank-1 terms are brought to.", json_schema_extra=_MORE
    )
    single_task: bool = Field(_OWN.single_task, description="Allow one task only.", json_schema_extra=_MORE)

    @model_validator(mode="after")
    def _complete(self) -> GenerateTrainConfig:
        for task in self.snapshots:
            if (task in self.examples) == (task in self.vectors):
                raise ValueError(f"the task '{task}' needs either examples or a vector")
        if odd := sorted({*self.examples, *self.vectors} - self.snapshots.keys()):
            raise ValueError(f"the task '{odd[0]}' has no snapshots")
        if self.examples and not self.base:
            raise ValueError("examples need a base, which makes the vectors")
        return self


class GenerateSampleConfig(JobConfig):
    """Make adapters of a task with a generator."""

    kind: ClassVar[str] = "generate-sample"

    generator: str = Field(min_length=1, description="The generator's file.")
    task: str = Field("", description="A task of its training.")
    examples: str = Field("", description="Instead: a text file with one example of a task per line.")
    vector: str = Field("", description="Instead: a .safetensors file with a task's vector.")
    base: str = Field(
        "", description="The base that makes the vector of examples, or for a task that of the adapters, as a check; "
        "its weights must be the training's.",
    )  # fmt: skip
    reference: str = Field("", description="Adapter whose statistics are taken (normalise 'reference').")
    count: int = Field(1, ge=1, description="How many adapters to make, with seeds in a row.")
    seed: int = Field(0, ge=0, description="Seed of the first.")
    temperature: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="Spread of the latent variable; 0 makes the task's mean adapter."
    )
    name: str = Field("", description="Name in the library; empty = the task's.")

    @model_validator(mode="after")
    def _one_task(self) -> GenerateSampleConfig:
        if sum(map(bool, (self.task, self.examples, self.vector))) != 1:
            raise ValueError("give one of task, examples and vector")
        if self.examples and not self.base:
            raise ValueError("examples need a base, which makes the vector")
        return self
