"""A dropped file of rows: kept where jobs find it, and shown as a training would read it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.errors import InputError
from studio import settings
from studio.datasets import texts
from studio.datasets.conversations import Columns, Conversation, conversations, labelled_texts, plain_texts
from studio.datasets.picture_questions import pictured, without_places
from ui import dropped, markup

TYPES = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"]
"""Endings of files that hold rows."""


def keep(file: str | Path) -> Path:
    """Copy a dropped file to where jobs find it later."""
    return dropped.keep(file, "rows")


def keep_with_pictures(files: Sequence[str | Path]) -> Path:
    """Copy a dropped file of rows and its pictures to where jobs find them; returns the file of rows.

    A picture is put where the rows look for it: under the path that a row gives, if the file names are the same.

    Raises:
        InputError: not one file of rows.
    """
    sources = [Path(file) for file in files]
    tables = [file for file in sources if file.suffix.lower() in TYPES]
    if len(tables) != 1:
        raise InputError(f"Drop one file of rows ({', '.join(TYPES)}) with its pictures; there are {len(tables)}.")
    table, loose = tables[0], {file.name: file for file in sources if file not in tables}
    total = hashlib.sha256(table.read_bytes())
    for name in sorted(loose):
        total.update(name.encode() + loose[name].read_bytes())
    target = settings.folder("datasets", f"rows-{total.hexdigest()[:12]}")
    dropped.copy(table, target / table.name)
    report = texts.scan(str(target / table.name))
    wanted = {Path(text).name: text for row in report.rows for text in _strings(row.values) if Path(text).name in loose}
    for name, source in loose.items():
        place = (target / wanted.get(name, name)).resolve()
        place = place if place.is_relative_to(target.resolve()) else target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        dropped.copy(source, place)
    return target / table.name


def _strings(value: Any) -> Iterator[str]:
    """Every short text inside a row's values."""
    if isinstance(value, str):
        yield from [value] if len(value) < 300 and "\n" not in value else []
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def describe_pictured(file: Path) -> str:
    """The first rows of a file of questions about pictures, as a training would read them.

    Raises:
        InputError: as the training itself.
    """
    report = texts.scan(str(file))
    texts.usable_rows(report, skip_broken=True)
    columns = report.columns
    understood = pictured(report, Columns())
    shown = "".join(f"<li>{_pictured(item)}</li>" for item in understood[:3])
    return _described(file, report, columns, shown)


def _pictured(item: Any) -> str:
    """The names of a row's pictures, then its conversation without their places."""
    named = " ".join(markup.tag(picture.name or "picture", "soft") for picture in item.pictures)
    return f"{named}<br>{without_places(_example(item.talk))}"


def describe(file: Path, task: str) -> str:
    """The first rows of a file as a training would read them.

    Raises:
        InputError: as the training itself.
    """
    report = texts.scan(str(file))
    texts.usable_rows(report, skip_broken=True)
    understood: list[Any] = (
        list(labelled_texts(report, Columns())) if task == "classification"
        else list(plain_texts(report, Columns())) if task == "masked" else conversations(report, Columns())
    )  # fmt: skip
    shown = "".join(f"<li>{_example(item)}</li>" for item in understood[:3])
    return _described(file, report, report.columns, shown)


def _described(file: Path, report: texts.TextReport, columns: Sequence[str], shown: str) -> str:
    """The file, how many rows it has, its columns, and the first rows."""
    broken = f"{len(report.broken)} unreadable ({', '.join(map(report.place, list(report.broken)[:5]))})"
    facts = f"{len(report.rows)} rows" + (f", {broken}" if report.broken else "")
    return (
        f'<section class="as-recipe" aria-label="Rows"><p><strong>{markup.text(file.name)}</strong>: '
        f"{markup.text(facts)}; columns {markup.text(', '.join(columns))}</p><ul>{shown}</ul></section>"
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
