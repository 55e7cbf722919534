"""Turns rows into batches of a language training: the parts shared by all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from studio.datasets.conversations import Conversation
from studio.datasets.encoding import IGNORED, Encoded
from studio.training.language.rows import Rows
from studio.training.schemas.language import TrainLanguageConfig

Batch = dict[str, torch.Tensor]


def spoken(rows: Rows, tokenizer: Any) -> dict[str, str]:
    """How the conversations were written, for later chats with the adapter; {} for plain texts."""
    if not any(isinstance(item, Conversation) for item in rows.shown):
        return {}
    template = tokenizer.chat_template
    return {"template": template if isinstance(template, str) else "", "begin": tokenizer.bos_token or "",
            "end": tokenizer.eos_token or ""}  # fmt: skip


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
    """A batch of samples, padded on the right to the longest.

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
        if all("task_types" in sample for sample in samples):
            batch["task_types"] = torch.tensor([sample["task_types"][0] for sample in samples])
        return batch


def _stack(rows: Sequence[Sequence[int]], length: int, fill: int) -> torch.Tensor:
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])
