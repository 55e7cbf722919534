"""A classifier of transcripts: a whole model, or a frozen base with an adapter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.errors import FamilyError, InputError
from pipelines.genomics import scoring
from pipelines.genomics.fasta import Record
from pipelines.genomics.kmers import Kmers
from pipelines.genomics.model import RnaModel, encoder_digest, head_modules, longer_positions, open_base
from pipelines.genomics.scoring import Score
from pipelines.genomics.task_file import RnaTask


@dataclass
class RnaClassifier:
    """A model that tells two kinds of transcripts apart, and how it reads them.

    Attributes:
        model: in evaluation mode, the adapter merged into it.
        remarks: what is assumed because a file does not say it.
    """

    model: Any
    kmers: Kmers
    task: RnaTask
    remarks: tuple[str, ...] = ()

    @classmethod
    def open(
        cls, base: Path, adapter: Path | None = None, *, dtype: str = "auto", device: str | torch.device = "cpu"
    ) -> RnaClassifier:
        """Open a base, with an adapter or with a head of its own.

        Raises:
            InputError: no such model, no classifier in it, or an adapter of another base, k or length.
            FamilyError: an adapter that does not fit the base.
        """
        told = RnaTask.read(adapter or base)
        labels = told.labels if told else ()
        opened = open_base(
            base, "classification", labels=labels, dtype=dtype, device=device,
            longest=told.max_length if told and not adapter else None, stride=told.stride if told else None,
        )  # fmt: skip
        if adapter is None:
            if opened.fresh:
                raise InputError(
                    f"'{base}' has only learnt hidden k-mers, it has no classifier: name an adapter, or train one "
                    "with  studio train rna."
                )
            task, remarks = _assumed(told, opened, str(base))
            return cls(opened.model, opened.kmers, task, remarks)
        if told is not None:
            digest = encoder_digest(opened.model)
            _lengthen(opened, told, adapter)
            told.check(opened.kmers, digest, adapter.name, Path(base).name)
        model = with_adapter(opened, adapter)
        task, remarks = _assumed(told, opened, adapter.name)
        return cls(model, dataclasses.replace(opened.kmers, longest=task.max_length), task, remarks)

    def score(self, records: list[Record]) -> list[Score]:
        """Scores of some transcripts."""
        return scoring.score(self.model, self.kmers, self.task, records)

    def stream(self, records: Iterable[Record], most: int = scoring.TOKENS) -> Iterator[Score]:
        """Scores of any number of transcripts, in their order; a batch has ``most`` tokens at most."""
        return scoring.stream(self.model, self.kmers, self.task, records, most)

    def label(self, score: Score, threshold: float | None = None) -> str:
        """The label of a score; empty for a transcript without a reading."""
        found = score.probability
        if found is None:
            return ""
        return self.task.labels[found >= (self.task.threshold if threshold is None else threshold)]


def with_adapter(base: RnaModel, adapter: Path) -> Any:
    """The base with a PEFT adapter, merged where it can be.

    Raises:
        InputError: it brings no classifier, which the base lacks.
        FamilyError: it does not fit.
    """
    from peft import PeftModel

    import adapters.layers.experts  # noqa: F401  makes PEFT know mixtures

    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"'{adapter}' is no PEFT folder: it has no readable adapter_config.json.") from None
    saved = config.get("modules_to_save") or ()
    missing = [name for name in base.fresh if not any(f".{part}." in f".{name}." for part in saved)]
    if missing:
        raise InputError(
            f"The adapter '{adapter.name}' does not bring '{missing[0]}', which the base has not learnt: it was "
            "trained for another task."
        )
    try:
        model: Any = PeftModel.from_pretrained(base.model, str(adapter))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise FamilyError(
            f"The adapter '{adapter.name}' does not fit '{base.source}' ({(reason or ['other layers'])[-1].strip()})."
        ) from None
    model = model.merge_and_unload() if config.get("peft_type") == "LORA" else model
    return model.eval()


def _lengthen(base: RnaModel, task: RnaTask, adapter: Path) -> None:
    """Give a base as many positions as the adapter brings (trained with train_positions)."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    brings = any("position_embeddings" in name for name in config.get("modules_to_save") or ())
    if brings and task.max_length > base.kmers.longest:
        longer_positions(base.model, task.max_length)
        base.tokenizer = dataclasses.replace(base.kmers, longest=task.max_length)


def _assumed(told: RnaTask | None, base: RnaModel, name: str) -> tuple[RnaTask, tuple[str, ...]]:
    """The task as told, or as the model's configuration and the paper suggest."""
    if told is not None:
        return told, ()
    named = base.model.config.id2label or {}
    if len(named) != 2 or not head_modules(base.model):
        raise InputError(f"'{name}' tells {len(named)} classes apart, transcripts are of two.")
    labels = tuple(str(named[number]) for number in (0, 1))
    if labels[0].startswith("LABEL_"):
        labels = ("mRNA", "lncRNA")
    task = RnaTask(base.kmers.k, base.kmers.stride, base.kmers.longest, (labels[0], labels[1]), view="full")
    said = f"'{name}' has no rna_task.json: label 0 is taken as {labels[0]}, 1 as {labels[1]}"
    return task, (f"{said}; transcripts are read whole",)
