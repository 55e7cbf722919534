"""A dropped file of rows: kept where jobs find it, and shown as a training would read it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from studio import settings
from studio.datasets import texts
from studio.datasets.conversations import Columns, Conversation, conversations, labelled_texts, plain_texts
from ui import markup

TYPES = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"]
"""Endings of files that hold rows."""


def keep(file: str | Path) -> Path:
    """Copy a dropped file to where jobs find it later, under the hash of its content."""
    source = Path(file)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    target = settings.folder("datasets", f"rows-{digest}") / source.name
    if not target.is_file():
        shutil.copyfile(source, target)
    return target


def describe(file: Path, task: str) -> str:
    """The first rows of a file as a training would read them.

    Raises:
        InputError: as the training itself.
    """
    report = texts.scan(str(file))
    broken = f"{len(report.broken)} unreadable ({', '.join(map(report.place, list(report.broken)[:5]))})"
    texts.usable_rows(report, skip_broken=True)
    understood: list[Any] = (
        list(labelled_texts(report, Columns())) if task == "classification"
        else list(plain_texts(report, Columns())) if task == "masked" else conversations(report, Columns())
    )  # fmt: skip
    shown = "".join(f"<li>{_example(item)}</li>" for item in understood[:3])
    facts = f"{len(report.rows)} rows" + (f", {broken}" if report.broken else "")
    return (
        f'<section class="as-recipe" aria-label="Rows"><p><strong>{markup.text(file.name)}</strong>: '
        f"{markup.text(facts)}; columns {markup.text(', '.join(report.columns))}</p><ul>{shown}</ul></section>"
    )


def _example(item: Any) -> str:
    if isinstance(item, Conversation):
        turns = (
            f"{markup.tag(message['role'])} {markup.text(_short(message['content']))}" for message in item.messages
        )
        return "<br>".join(turns)
    label = f"{markup.tag(item.label)} " if item.label is not None else ""
    return f"{label}{markup.text(_short(item.text))}"


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
