"""Configurations of the jobs that prune heads and channels: a language training and what is cut."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from studio.training.schemas import rules
from studio.training.schemas.base import changed, option
from studio.training.schemas.language import TrainLanguageConfig

_PRUNING = option("Pruning")
_PRUNING_MORE = option("Pruning", advanced=True)
_ALIGNMENT = option("Alignment")
_ALIGNMENT_MORE = option("Alignment", advanced=True)


class PruningConfig(TrainLanguageConfig):
    """What both have.

    Attributes:
        fixed: fields of a training that have one possible value here; forms and commands leave them out.
    """

    fixed: ClassVar[tuple[str, ...]] = ("preset", "task", "method", "use_dora", "continue_from", "l4q_bits")

    preset: str = changed(TrainLanguageConfig, "preset", description="Starting values; there are none for pruning.")
    prune: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Share of the heads and of the feed-forward channels that goes, in every layer that is pruned.",
        json_schema_extra=_PRUNING,
    )
    whole_first: int = Field(0, ge=0, description="First layers that stay whole.", json_schema_extra=_PRUNING)
    whole_last: int = Field(0, ge=0, description="Last layers that stay whole.", json_schema_extra=_PRUNING)

    @model_validator(mode="after")
    def _pruned(self) -> PruningConfig:
        rules.refuse(self, _REFUSED)
        return self


class LoramConfig(PruningConfig):
    """Train a LoRA on a pruned copy of its base, and use it with the whole base (LoRAM)."""

    kind: ClassVar[str] = "compress-loram"

    prune: float = changed(PruningConfig, "prune", default=0.65)
    whole_first: int = changed(PruningConfig, "whole_first", default=4)
    whole_last: int = changed(PruningConfig, "whole_last", default=2)
    pattern: Literal["groups", "unstructured", "4:8", "2:4"] = Field(
        "groups",
        description="groups cuts whole heads and channels; the others put zeros in place, which saves no memory here: "
        "single weights, or all but 4 of 8 (2 of 4) neighbouring inputs.",
        json_schema_extra=_PRUNING,
    )
    importance: Literal["taylor", "wanda", "magnitude", "random"] = Field(
        "taylor",
        description="What is kept: taylor (groups) looks at gradients of the rows and needs memory for one gradient of "
        "every weight, wanda (zeros) at weights and inputs, magnitude at the weights, random at nothing.",
        json_schema_extra=_PRUNING,
    )
    importance_batches: int = Field(
        10, ge=1, description="taylor, wanda: batches that are looked at.", json_schema_extra=_PRUNING_MORE
    )
    keep_pruned: bool = Field(
        False,
        description="Also put the pruned base into the library, for further adapters (studio compress recover).",
        json_schema_extra=_PRUNING,
    )
    align_data: str = Field(
        "",
        description="Rows of general text on which the whole pruned base is trained first; empty = it is not.",
        json_schema_extra=_ALIGNMENT,
    )
    align_steps: int = Field(100, ge=1, description="Steps of that training.", json_schema_extra=_ALIGNMENT)
    align_rate: float = Field(5e-5, gt=0, description="Its learning rate.", json_schema_extra=_ALIGNMENT)
    align_batch: int = Field(8, ge=1, description="Its samples per step.", json_schema_extra=_ALIGNMENT_MORE)


    @model_validator(mode="after")
    def _patterned(self) -> LoramConfig:
        rules.refuse(self, _PATTERNS)
        return self


class LoraPruneConfig(PruningConfig):
    """Prune a base while a LoRA learns, and merge the two into a smaller base (LoRAPrune)."""

    kind: ClassVar[str] = "compress-loraprune"
    fixed: ClassVar[tuple[str, ...]] = (*PruningConfig.fixed, "init")

    criterion: Literal["lora", "gradient", "magnitude", "random"] = Field(
        "lora",
        description="How groups are judged: lora by the LoRA's gradients; for comparison the true gradient (memory for "
        "one gradient of every weight), magnitude or random.",
        json_schema_extra=_PRUNING,
    )
    prune_every: int = Field(10, ge=1, description="Steps between two prunings.", json_schema_extra=_PRUNING_MORE)
    prune_warmup: float = Field(
        0.1, ge=0, lt=1, description="Share of the run before the first pruning.", json_schema_extra=_PRUNING_MORE
    )
    prune_cooldown: float = Field(
        0.1, ge=0, lt=1, description="Share of the run after the last pruning.", json_schema_extra=_PRUNING_MORE
    )
    prune_decay: float = Field(
        0.9, ge=0, lt=1, description="Memory of the running mean of scores.", json_schema_extra=_PRUNING_MORE
    )
    prune_form: Literal["paper", "official"] = Field(
        "paper",
        description="The paper's formulas, or the authors' program's (which ends a little below the share).",
        json_schema_extra=_PRUNING_MORE,
    )

    @model_validator(mode="after")
    def _timed(self) -> LoraPruneConfig:
        rules.refuse(self, _TIMED)
        return self


_REFUSED: list[rules.Refusal] = [
    (lambda c: c.task != "causal", "only models that write (task causal) are pruned: set task to 'causal'"),
    (lambda c: c.method != "lora", "an ordinary LoRA is trained here: set method to 'lora'"),
    (lambda c: c.use_dora, "DoRA's norms do not survive cutting: switch use_dora off"),
    (lambda c: bool(c.l4q_bits), "the rounding of the small base is not that of the whole one: set l4q_bits to 0"),
    (lambda c: bool(c.continue_from), "the adapter of another base does not fit the pruned one: empty continue_from"),
]
_PATTERNS: list[rules.Refusal] = [
    (
        lambda c: c.pattern == "groups" and c.importance == "wanda",
        "wanda judges single weights: set importance to 'taylor', or pattern to 'unstructured'",
    ),
    (
        lambda c: c.pattern != "groups" and c.importance == "taylor",
        "taylor judges whole groups: set importance to 'wanda', 'magnitude' or 'random'",
    ),
    (
        lambda c: ":" in c.pattern and c.prune != 0.5,
        "this pattern makes half of the weights zero: set prune to 0.5",
    ),
]
_TIMED: list[rules.Refusal] = [
    (
        lambda c: c.prune_warmup + c.prune_cooldown >= 1,
        "prune_warmup and prune_cooldown leave no steps to prune in: their sum must be below 1",
    ),
    (lambda c: c.init != "default", "LoRAPrune judges A and B as they are: set init to 'default'"),
]
