"""Prompt sets in the forms in which people have them, as one kind of record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import assets
from adapters.errors import InputError
from studio.datasets import texts

Kind = Literal["harmful", "benign"]

COLUMNS = ("prompt", "goal", "instruction", "question", "text")
"""Where a row keeps its prompt; the first that is there is read."""
KNOWN = (*COLUMNS, "category", "type", "label", "kind", "id", "id_v2", "source", "focus", "note", "target")
_BENIGN = ("benign", "safe", "harmless")
_HARMFUL = ("harmful", "unsafe")
MOST_BROKEN = 0.01
"""A file in which a larger share of the rows is not text is refused."""


@dataclass(frozen=True)
class Prompt:
    """One request. ``id`` is its source, its number there and the start of its hash; it says nothing of the text."""

    id: str
    text: str
    category: str
    kind: Kind
    source: str


@dataclass
class PromptSet:
    """Prompts of one or more files, without duplicates.

    Attributes:
        prompts: in the order of the files.
        sha256: of each file, by its name.
        remarks: what was left out.
    """

    prompts: list[Prompt] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def of(self, kind: Kind) -> list[Prompt]:
        return [prompt for prompt in self.prompts if prompt.kind == kind]


def shipped() -> Path:
    """The studio's own harmless requests that sound harmful: homonyms, figures of speech, definitions, history."""
    return assets.path("audit") / "benign.jsonl"


def read(harmful: Sequence[str], benign: Sequence[str]) -> PromptSet:
    """The prompts of all files.

    A row that says itself which kind it is (``kind``, or XSTest's ``label``) is of that kind, wherever it stands.

    Args:
        harmful, benign: JSON (category -> list of prompts), JSONL, CSV, TSV or Parquet files.

    Raises:
        InputError: a file that is missing, has no column with prompts, or holds more than a few that are not text.
    """
    from adapters import files

    found = PromptSet()
    seen: set[str] = set()
    given: list[tuple[str, Kind]] = [*((file, "harmful") for file in harmful), *((file, "benign") for file in benign)]
    for place, kind in given:
        path = Path(place).expanduser()
        if not path.is_file():
            raise InputError(f"There is no file of prompts '{place}'.")
        found.sha256[path.name] = files.sha256(path)
        rows, broken = _rows(path, kind)
        if broken > MOST_BROKEN * (broken + len(rows)):
            raise InputError(f"'{path.name}': {broken} of {broken + len(rows)} prompts are empty or not text.")
        twice = 0
        for number, (text, category, own) in enumerate(rows):
            digest = hashlib.sha256(text.encode()).hexdigest()
            if digest in seen:
                twice += 1
                continue
            seen.add(digest)
            found.prompts.append(Prompt(f"{path.stem}-{number}-{digest[:8]}", text, category, own, path.name))
        for count, why in ((twice, "stand there twice"), (broken, "are empty or not text")):
            if count:
                found.remarks.append(f"{path.name}: {count} prompts {why} and are left out.")
    return found


def _rows(path: Path, kind: Kind) -> tuple[list[tuple[str, str, Kind]], int]:
    """(text, category, kind) of each prompt, and how many are empty or not text."""
    if path.suffix.lower() == ".json":
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise InputError(f"'{path.name}' is not valid JSON.") from None
        if isinstance(value, dict):
            return _by_category(path, value, kind)
    report = texts.scan(str(path))
    column = next((name for name in COLUMNS if name in report.columns), None)
    if column is None:
        raise InputError(
            f"'{path.name}' has the columns {', '.join(report.columns) or 'none'}: prompts are read from one of "
            f"{', '.join(COLUMNS)}, or from a JSON file of the form {{category: [prompt, ...]}}."
        )
    unknown = [name for name in report.columns if name not in KNOWN]
    if unknown:
        raise InputError(f"'{path.name}': the column '{unknown[0]}' is not known; remove it, or name it as one of "
                         f"{', '.join(KNOWN)}.")  # fmt: skip
    found, broken = [], len(report.broken)
    for row in report.rows:
        text = row.values.get(column)
        if not isinstance(text, str) or not text.strip():
            broken += 1
            continue
        category = row.values.get("category") or row.values.get("type") or ""
        found.append((text, str(category), _own_kind(path, row.number, row.values, kind)))
    return found, broken


def _own_kind(path: Path, number: int, values: dict[str, Any], otherwise: Kind) -> Kind:
    told = str(values.get("kind") or values.get("label") or "").strip().lower()
    if not told:
        return otherwise
    if told in _BENIGN:
        return "benign"
    if told in _HARMFUL:
        return "harmful"
    raise InputError(f"'{path.name}', row {number}: the kind '{told}' is none of {', '.join((*_BENIGN, *_HARMFUL))}.")


def _by_category(path: Path, value: dict[str, Any], kind: Kind) -> tuple[list[tuple[str, str, Kind]], int]:
    found, broken = [], 0
    for category, prompts in value.items():
        if not isinstance(prompts, list):
            raise InputError(f"'{path.name}': the category '{category}' is not a list of prompts.")
        good = list(_texts(prompts))
        broken += len(prompts) - len(good)
        found += [(text, category, kind) for text in good]
    return found, broken


def _texts(values: list[Any]) -> Iterator[str]:
    yield from (value for value in values if isinstance(value, str) and value.strip())
