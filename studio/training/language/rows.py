"""Reads the rows of a language training before any model is loaded (and without torch)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import InputError, nearest
from studio.datasets import picture_questions, utterances
from studio.datasets.conversations import Columns, Text, conversations, labelled_texts, plain_texts
from studio.datasets.encoding import CHATML
from studio.datasets.seeds import rng
from studio.datasets.texts import TextReport, scan, usable_rows
from studio.training.language import experts
from studio.training.language.about import known
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.schemas.speech import TrainSpeechConfig
from studio.training.schemas.vision_language import TrainVisionLanguageConfig

Items = list[Any]
"""Conversations, texts, or conversations about pictures."""


@dataclass
class Rows:
    """The job's rows, read and understood, before any model is loaded.

    Attributes:
        shown: rows to train on; ``held_out`` rows are only for measuring.
        labels: classification: names of the classes, sorted.
        types: row number -> its type, where a method tells types of rows apart.
        digest: identity of the data.
        remarks: what is not used, or may not work as meant.
    """

    shown: Items
    held_out: Items
    labels: list[str] = field(default_factory=list)
    types: dict[int, int] = field(default_factory=dict)
    digest: str = ""
    columns: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_rows(config: TrainLanguageConfig, understand: Callable[[TextReport, Columns], Items]) -> Rows:
    """The rows of the job, as the task understands them; without labels.

    Raises:
        InputError: missing file or columns, unreadable or unusable rows (by number), too few rows.
    """
    columns = Columns(
        config.messages_column, config.prompt_column, config.completion_column, config.text_column,
        config.label_column, config.type_column,
    )  # fmt: skip
    return gather(config, lambda report: understand(report, columns))


def gather(
    config: Any, understand: Callable[[TextReport], list[Any]], scan: Callable[[str, str], TextReport] = scan
) -> Rows:
    """The rows of a job with ``data``, ``validation_data`` or ``validation_split``, each as ``understand`` makes them.

    Args:
        scan: reads the file (or folder, or hub id).

    Raises:
        InputError: as :func:`read_rows`.
    """
    report = usable_rows(scan(config.data, config.data_split), config.skip_broken, config.limit)
    items = understand(report)
    held_out: Items = []
    digest = report.digest()
    if config.validation_data:
        other = usable_rows(scan(config.validation_data, config.data_split), config.skip_broken)
        held_out, digest = understand(other), f"{digest} {other.digest()}"
        report.remarks += [f"{other.source}: {remark}" for remark in other.remarks if remark not in report.remarks]
    elif config.validation_split:
        items, held_out = split(items, config.validation_split, config.seed)
    told = experts.remark(config)
    remarks = [*report.remarks, *([told] if told else [])]
    return Rows(items, held_out, [], types_of(report, config), digest, report.columns, remarks)


def types_of(report: TextReport, config: Any) -> dict[int, int]:
    """The type of each row, 0 or 1, from ``type_column``.

    Raises:
        InputError: there is no such column, or a row has another type.
    """
    column = getattr(config, "type_column", "")
    if not column:
        return {}
    if column not in report.columns:
        raise InputError(
            f"'{report.source}' has no column '{column}'{nearest(column, report.columns)}: it has "
            f"{', '.join(report.columns)}."
        )
    found = {row.number: row.values.get(column) for row in report.rows}
    wrong = next((number for number, value in found.items() if str(value) not in ("0", "1")), None)
    if wrong is not None:
        raise InputError(
            f"'{report.source}', {report.place(wrong)}: the type in '{column}' is 0 or 1, not {found[wrong]!r}."
        )
    return {number: int(str(value)) for number, value in found.items()}


def split(items: Items, share: float, seed: int) -> tuple[Items, Items]:
    """(shown, held out): a share of the rows is held out, drawn once for a seed.

    Raises:
        InputError: too few rows to hold some out.
    """
    count = max(1, round(len(items) * share))
    if count >= len(items):
        raise InputError(f"{len(items)} rows are too few to hold {share:.0%} of them out: lower validation_split.")
    order = list(range(len(items)))
    rng(seed, "validation").shuffle(order)
    chosen = set(order[:count])
    return (
        [item for number, item in enumerate(items) if number not in chosen],
        [item for number, item in enumerate(items) if number in chosen],
    )


def read(config: TrainLanguageConfig) -> Rows:
    """The rows of the job as its task reads them (:attr:`~studio.training.language.about.About.rows`).

    Raises:
        InputError: missing file or columns, unreadable or unusable rows (by number), too few rows or labels.
    """
    module, _, name = known()[config.task].rows.partition(":")
    found: Rows = getattr(importlib.import_module(module), name)(config)
    return found


def texts(config: TrainLanguageConfig) -> Rows:
    """Plain texts."""
    return read_rows(config, lambda report, columns: list(plain_texts(report, columns, config.skip_broken)))


def talks(config: TrainLanguageConfig) -> Rows:
    """Conversations, prompts with completions, or texts to continue."""
    return read_rows(
        config, lambda report, columns: conversations(report, columns, config.system_prompt, config.skip_broken)
    )


def labelled(config: TrainLanguageConfig) -> Rows:
    """Texts with labels."""
    rows = read_rows(config, lambda report, columns: list(labelled_texts(report, columns, config.skip_broken)))
    rows.labels = labels_of(rows, config.data)
    return rows


def pictured(config: TrainVisionLanguageConfig) -> Rows:
    """Conversations about pictures, whose files exist; they are opened later.

    Raises:
        InputError: as :func:`read_rows`, and for missing pictures.
    """
    columns = Columns(messages=config.messages_column, prompt=config.question_column, completion=config.answer_column)
    image, system, skip = config.image_column, config.system_prompt, config.skip_broken
    return gather(config, lambda report: picture_questions.pictured(report, columns, image, system, skip))


def spoken(config: TrainSpeechConfig) -> Rows:
    """Recordings with their texts; sounds are opened later.

    Raises:
        InputError: as :func:`read_rows`, and for missing sounds.
    """
    columns, skip = (config.audio_column, config.text_column), config.skip_broken
    return gather(config, lambda report: utterances.utterances(report, *columns, skip), utterances.scan)


def labels_of(rows: Rows, source: str) -> list[str]:
    """The classes, sorted.

    Raises:
        InputError: there is only one, or held-out rows have another label.
    """
    labels = sorted({str(item.label) for item in rows.shown if isinstance(item, Text)})
    if len(labels) < 2:
        raise InputError(f"'{source}' has only one label ('{labels[0]}'): classification needs at least two.")
    strange = sorted({str(item.label) for item in rows.held_out if isinstance(item, Text)} - set(labels))
    if strange:
        raise InputError(f"The label '{strange[0]}' is in the validation rows, but not in the rows to learn from.")
    return labels


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
