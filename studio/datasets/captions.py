"""Captions: where they are found and what is done to them before the text encoder sees them."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping
from pathlib import Path

from adapters.errors import InputError

COLUMNS = ("text", "caption", "prompt")
"""Names under which metadata.jsonl and metadata.csv may hold the caption."""


def read_captions(folder: Path, pictures: list[Path]) -> dict[Path, str]:
    """Caption by picture: ``metadata.jsonl`` or ``metadata.csv`` first, a same-named ``.txt`` where those are silent.

    Raises:
        InputError: metadata that cannot be read, or that names pictures which are not in ``folder``.
    """
    listed = _read_metadata(folder)
    known = {picture.relative_to(folder).as_posix() for picture in pictures}
    strange = sorted(set(listed) - known)
    if strange:
        raise InputError(
            f"The captions in '{folder}' name {len(strange)} pictures that are not there: {', '.join(strange[:5])}."
        )
    found: dict[Path, str] = {}
    for picture in pictures:
        text = listed.get(picture.relative_to(folder).as_posix())
        beside = picture.with_suffix(".txt")
        if text is None and beside.is_file():
            text = _read_text(beside)
        if text is not None and text.strip():
            found[picture] = " ".join(text.split())
    return found


def _read_metadata(folder: Path) -> dict[str, str]:
    jsonl, table = folder / "metadata.jsonl", folder / "metadata.csv"
    if jsonl.is_file():
        return _read_jsonl(jsonl)
    return _read_csv(table) if table.is_file() else {}


def _read_jsonl(file: Path) -> dict[str, str]:
    rows: dict[str, str] = {}
    for number, line in enumerate(_read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"Line {number} of '{file}' is not JSON: {error}.") from None
        rows |= _row(row if isinstance(row, dict) else {}, file, number)
    return rows


def _read_csv(file: Path) -> dict[str, str]:
    rows: dict[str, str] = {}
    for number, row in enumerate(csv.DictReader(_read_text(file).splitlines()), start=2):
        rows |= _row(row, file, number)
    return rows


def _row(row: Mapping[str, object], file: Path, number: int) -> dict[str, str]:
    name = row.get("file_name")
    text = next((row[column] for column in COLUMNS if row.get(column) is not None), None)
    if not isinstance(name, str) or not isinstance(text, str):
        raise InputError(f"Line {number} of '{file}' must give file_name and text.")
    return {Path(name).as_posix(): text}


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"'{file}' is not a UTF-8 text file.") from None
    except OSError as error:
        raise InputError(f"'{file}' cannot be read: {error.strerror}.") from None


def compose_caption(
    caption: str | None, *, template: str = "{caption}", instance_prompt: str = "", trigger: str = "", prefix: str = ""
) -> str:
    """The prompt a picture is trained with.

    A caption goes through ``template``, a missing one is replaced by ``instance_prompt``; a trigger word that is in
    neither is put in front; ``prefix`` comes before everything.
    """
    pattern = template if caption is not None else instance_prompt
    text = pattern.replace("{caption}", caption or "").replace("{trigger}", trigger).strip()
    if trigger and trigger not in text:
        text = f"{trigger}, {text}" if text else trigger
    return f"{prefix}{text}"


def vary_caption(
    caption: str, rng: random.Random, *, dropout: float = 0.0, shuffle: bool = False, keep: int = 1
) -> str:
    """Drop the caption with probability ``dropout``; shuffle its comma-separated parts after the first ``keep``."""
    if dropout and rng.random() < dropout:
        return ""
    if not shuffle:
        return caption
    parts = [part.strip() for part in caption.split(",")]
    moving = parts[keep:]
    rng.shuffle(moving)
    return ", ".join(parts[:keep] + moving)
