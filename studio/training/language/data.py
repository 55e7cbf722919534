"""From rows to batches of a language training, as far as all tasks do it alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adapters.errors import InputError
from studio.datasets.conversations import Columns, Conversation, Text
from studio.datasets.encoding import CHATML, IGNORED, Encoded
from studio.datasets.seeds import rng
from studio.datasets.texts import TextReport, scan, usable_rows
from studio.training.schemas.language import TrainLanguageConfig

Batch = dict[str, torch.Tensor]
Items = list[Conversation | Text]


@dataclass
class Rows:
    """The job's rows, read and understood, before any model is loaded.

    Attributes:
        shown: what is trained on; ``held_out`` is only measured with.
        labels: classification: names of the classes, sorted.
        digest: identity of the data.
        remarks: what of the rows is not used.
    """

    shown: Items
    held_out: Items
    labels: list[str] = field(default_factory=list)
    digest: str = ""
    columns: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_rows(config: TrainLanguageConfig, understand: Callable[[TextReport, Columns], Items]) -> Rows:
    """The rows of the job, as the task understands them; without labels.

    Raises:
        InputError: missing file or columns, unreadable or unusable rows (by number), too few rows.
    """
    columns = Columns(
        config.messages_column, config.prompt_column, config.completion_column, config.text_column, config.label_column
    )
    report = usable_rows(scan(config.data, config.data_split), config.skip_broken, config.limit)
    items = understand(report, columns)
    held_out: Items = []
    digest = report.digest()
    if config.validation_data:
        other = usable_rows(scan(config.validation_data, config.data_split), config.skip_broken)
        held_out, digest = understand(other, columns), f"{digest} {other.digest()}"
        report.remarks += [f"{other.source}: {remark}" for remark in other.remarks if remark not in report.remarks]
    elif config.validation_split:
        items, held_out = split(items, config.validation_split, config.seed)
    return Rows(items, held_out, [], digest, report.columns, report.remarks)


def split(items: Items, share: float, seed: int) -> tuple[Items, Items]:
    """(shown, kept out): a share of the rows, drawn once for a seed.

    Raises:
        InputError: too few rows to keep some out.
    """
    count = max(1, round(len(items) * share))
    if count >= len(items):
        raise InputError(f"{len(items)} rows are too few to keep {share:.0%} of them out: lower validation_split.")
    order = list(range(len(items)))
    rng(seed, "validation").shuffle(order)
    chosen = set(order[:count])
    return (
        [item for number, item in enumerate(items) if number not in chosen],
        [item for number, item in enumerate(items) if number in chosen],
    )


def spoken(rows: Rows, tokenizer: Any) -> dict[str, str]:
    """How the conversations were written, for whoever talks to the adapter later; {} for plain texts."""
    if not any(isinstance(item, Conversation) for item in rows.shown):
        return {}
    template = tokenizer.chat_template
    return {"template": template if isinstance(template, str) else "", "begin": tokenizer.bos_token or "",
            "end": tokenizer.eos_token or ""}  # fmt: skip


def template_of(config: TrainLanguageConfig) -> str:
    """The text of the configured chat template (empty = the base's own).

    Raises:
        InputError: it is neither 'chatml' nor a readable file.
    """
    if config.chat_template in ("", "chatml"):
        return CHATML if config.chat_template else ""
    try:
        return Path(config.chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError(
            f"The chat template '{config.chat_template}' is neither 'chatml' nor a readable Jinja file."
        ) from None


# ------------------------------------------------------------------------------------------------ samples


@dataclass
class Samples:
    """Encoded rows, and a sentence on what was cut or left out."""

    shown: list[Encoded]
    held_out: list[Encoded]
    remark: str = ""


def whole_texts(rows: Rows, tokenizer: Any, config: TrainLanguageConfig) -> Samples:
    """Every text as one sample, cut at ``max_length``; with the number of its label where there are labels."""
    shown, cut = _texts(rows.shown, rows.labels, tokenizer, config.max_length)
    held_out, _ = _texts(rows.held_out, rows.labels, tokenizer, config.max_length)
    remarks = [*rows.remarks, *([f"{cut} texts were cut at max_length {config.max_length}"] if cut else [])]
    return Samples(shown, held_out, "; ".join(remarks))


def _texts(
    items: Sequence[Any], labels: Sequence[str], tokenizer: Any, longest: int
) -> tuple[list[Encoded], int]:  # fmt: skip
    made, cut = [], 0
    for item in items:
        ids = tokenizer(item.text, item.second)["input_ids"]
        if len(ids) > longest:
            cut += 1
            ids = tokenizer(item.text, item.second, truncation=True, max_length=longest)["input_ids"]
        sample: Encoded = {"input_ids": list(ids)}
        if labels:
            sample["labels"] = [labels.index(str(item.label))]
        made.append(sample)
    return made, cut


# ------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Collate:
    """Samples to a batch, padded on the right to the longest.

    Packed rows get no attention mask: their positions tell the model which tokens belong together, and padding is a
    sequence of its own.
    """

    pad: int
    packed: bool = False
    classes: bool = False

    def __call__(self, samples: Sequence[Mapping[str, list[int]]]) -> Batch:
        longest = max(len(sample["input_ids"]) for sample in samples)
        batch: Batch = {"input_ids": _stack([sample["input_ids"] for sample in samples], longest, self.pad)}
        if self.packed:
            positions = [[*s["position_ids"], *range(longest - len(s["position_ids"]))] for s in samples]
            batch["position_ids"] = torch.tensor(positions)
        else:
            batch["attention_mask"] = _stack([[1] * len(sample["input_ids"]) for sample in samples], longest, 0)
        if self.classes:
            batch["labels"] = torch.tensor([sample["labels"][0] for sample in samples])
        elif all("labels" in sample for sample in samples):
            batch["labels"] = _stack([sample["labels"] for sample in samples], longest, IGNORED)
        return batch


def _stack(rows: Sequence[Sequence[int]], length: int, fill: int) -> torch.Tensor:
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])
