"""From rows to batches of a language training: samples as tokens, batches, masks, and a look before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adapters.errors import InputError
from studio.datasets.conversations import Columns, Conversation, Text, conversations, labelled_texts, plain_texts
from studio.datasets.encoding import CHATML, IGNORED, Encoded, encode_all, pack, unwritten
from studio.datasets.seeds import derive, rng
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


def read_rows(config: TrainLanguageConfig) -> Rows:
    """The rows of the job.

    Raises:
        InputError: missing file or columns, unreadable or unusable rows (by number), too few rows or labels.
    """
    report = usable_rows(scan(config.data, config.data_split), config.skip_broken, config.limit)
    items = _items(report, config)
    held_out: Items = []
    digest = report.digest()
    if config.validation_data:
        other = usable_rows(scan(config.validation_data, config.data_split), config.skip_broken)
        held_out, digest = _items(other, config), f"{digest} {other.digest()}"
        report.remarks += [f"{other.source}: {remark}" for remark in other.remarks if remark not in report.remarks]
    elif config.validation_split:
        items, held_out = split(items, config.validation_split, config.seed)
    labels = sorted({str(item.label) for item in items if isinstance(item, Text)}) if _classifies(config) else []
    if _classifies(config):
        _check_labels(labels, held_out, config)
    return Rows(items, held_out, labels, digest, report.columns, report.remarks)


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


def encode(rows: Rows, tokenizer: Any, config: TrainLanguageConfig, longest: int | None) -> Samples:
    """Tokens of every row.

    Raises:
        InputError: max_length above what the model reads, no chat template, or nothing left to learn.
    """
    if longest is not None and config.max_length > longest:
        raise InputError(
            f"max_length {config.max_length} is more than the {longest} tokens this model reads: lower it."
        )
    if config.task == "causal":
        return _causal(rows, tokenizer, config)
    shown, cut = _plain(rows.shown, rows.labels, tokenizer, config)
    held_out, _ = _plain(rows.held_out, rows.labels, tokenizer, config)
    remarks = [*rows.remarks, *([f"{cut} texts were cut at max_length {config.max_length}"] if cut else [])]
    return Samples(shown, held_out, "; ".join(remarks))


def _causal(rows: Rows, tokenizer: Any, config: TrainLanguageConfig) -> Samples:
    rules: dict[str, Any] = {"max_length": config.max_length, "too_long": config.too_long, "loss_on": config.loss_on}
    made = encode_all(rows.shown, tokenizer, **rules)
    held_out = encode_all(rows.held_out, tokenizer, **rules).samples if rows.held_out else []
    remarks = [*rows.remarks, *unwritten([*rows.shown, *rows.held_out], str(tokenizer.chat_template or ""))]
    if made.ended:
        remarks.append(f"in {len(made.ended)} rows an end token is added, since the chat template writes none")
    if made.skipped:
        remarks.append(f"{len(made.skipped)} rows are longer than {config.max_length} tokens and left out")
    if made.cut:
        remarks.append(f"{len(made.cut)} rows were cut at {config.max_length} tokens")
    if made.silent:
        remarks.append(f"in {len(made.silent)} rows nothing was left to learn")
    shown = made.samples
    if config.packing:
        count = len(shown)
        shown, held_out = pack(shown, config.max_length), pack(held_out, config.max_length)
        remarks.append(f"{count} samples are packed into {len(shown)} rows")
    return Samples(shown, held_out, "; ".join(remarks))


def _plain(
    items: Sequence[Any], labels: Sequence[str], tokenizer: Any, config: TrainLanguageConfig
) -> tuple[list[Encoded], int]:
    made, cut = [], 0
    for item in items:
        ids = tokenizer(item.text, item.second)["input_ids"]
        if len(ids) > config.max_length:
            cut += 1
            ids = tokenizer(item.text, item.second, truncation=True, max_length=config.max_length)["input_ids"]
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


def masked(batch: Batch, tokenizer: Any, share: float, seed: int, stream: str, number: int) -> Batch:
    """A batch of whole texts with gaps to fill, as BERT learns (arXiv 1810.04805): of the chosen tokens 80 % become
    the mask, 10 % a random token, 10 % stay. At least one token of every text is chosen."""
    generator = torch.Generator().manual_seed(derive(seed, stream, number))
    ids = batch["input_ids"].cpu().clone()
    special = torch.tensor(
        [tokenizer.get_special_tokens_mask(row.tolist(), already_has_special_tokens=True) for row in ids]
    ).bool()
    dice = torch.rand(ids.shape, generator=generator).masked_fill(special, 2.0)
    least = dice.min(dim=1, keepdim=True).values
    chosen = (dice < share) | ((dice == least) & ~special)
    labels = ids.masked_fill(~chosen, IGNORED)
    kind = torch.rand(ids.shape, generator=generator)
    ids[chosen & (kind < 0.8)] = tokenizer.mask_token_id
    strange = chosen & (kind >= 0.8) & (kind < 0.9)
    ids[strange] = torch.randint(len(tokenizer), ids.shape, generator=generator)[strange]
    device = batch["input_ids"].device
    return {**batch, "input_ids": ids.to(device), "labels": labels.to(device)}


# ------------------------------------------------------------------------------------------------ small things


def _items(report: TextReport, config: TrainLanguageConfig) -> Items:
    columns = Columns(
        config.messages_column, config.prompt_column, config.completion_column, config.text_column, config.label_column
    )
    if config.task == "classification":
        return list(labelled_texts(report, columns, config.skip_broken))
    if config.task == "masked":
        return list(plain_texts(report, columns, config.skip_broken))
    return conversations(report, columns, config.system_prompt, config.skip_broken)


def _classifies(config: TrainLanguageConfig) -> bool:
    return config.task == "classification"


def _check_labels(labels: Sequence[str], held_out: Items, config: TrainLanguageConfig) -> None:
    if len(labels) < 2:
        raise InputError(f"'{config.data}' has one label only ('{labels[0]}'): classification needs at least two.")
    strange = sorted({str(item.label) for item in held_out if isinstance(item, Text)} - set(labels))
    if strange:
        raise InputError(f"The label '{strange[0]}' is in the rows to measure with, but in none to learn from.")
