"""Rows of text data: .jsonl, .json, .csv, .tsv, .parquet and .txt files, or a data set of the Hugging Face Hub.

Every row keeps the number by which people find it: the line of a text file, the row of a table (from 1).
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import InputError, MissingDependencyError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One row: its number in the file and its values by column."""

    number: int
    values: dict[str, Any]


@dataclass
class TextReport:
    """What is in a file of text data.

    Attributes:
        source: the file, or the hub id.
        unit: what the numbers count ("line", "row", "paragraph").
        rows: the readable ones.
        broken: number -> what is wrong there.
        remarks: sentences on what is not used.
    """

    source: str
    unit: str = "row"
    rows: list[Row] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """Every column of any row, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.values))

    def digest(self) -> str:
        """SHA-256 over every row: the identity of the data set."""
        total = hashlib.sha256()
        for row in self.rows:
            total.update(json.dumps(row.values, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\0")
        return total.hexdigest()

    def place(self, number: int) -> str:
        """ "line 7", for messages."""
        return f"{self.unit} {number}"


def scan(source: str, split: str = "train") -> TextReport:
    """Read every row of ``source``; broken ones are recorded, not refused.

    Raises:
        InputError: the file is missing, of no known kind or unreadable, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_file():
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise InputError(f"'{path.name}' is not text data: use {', '.join(_READERS)} (or a hub id, owner/name).")
        return reader(path)
    if path.is_dir():
        raise InputError(f"'{source}' is a folder: name one file ({', '.join(_READERS)}).")
    if on_hub(source):
        return _hub(source, split)
    raise InputError(f"The data file '{source}' does not exist.")


def on_hub(source: str) -> bool:
    """Whether ``source`` names a data set of the hub rather than a file."""
    path = Path(source).expanduser()
    named = bool(HUB_ID.fullmatch(source)) and path.suffix.lower() not in _READERS
    return named and not path.exists()


def usable_rows(report: TextReport, skip_broken: bool = False, limit: int | None = None) -> TextReport:
    """``report``, with an error if its rows cannot be trained on.

    Raises:
        InputError: broken rows (by number; left out with ``skip_broken``), or no rows at all.
    """
    if report.broken:
        first = list(report.broken.items())[:_SHOWN]
        shown = "; ".join(f"{report.place(number)}: {reason}" for number, reason in first)
        more = f" and {len(report.broken) - len(first)} more" if len(report.broken) > len(first) else ""
        if not skip_broken:
            raise InputError(
                f"'{report.source}' has {len(report.broken)} unreadable rows ({shown}{more}): "
                "correct them, or set skip_broken to true to leave them out."
            )
        report.remarks.append(f"{left_out(len(report.broken))} ({shown}{more})")
    if not report.rows:
        raise InputError(f"'{report.source}' holds no rows.")
    if limit is not None:
        report.rows = report.rows[:limit]
    return report


def left_out(count: int) -> str:
    """ "3 rows are left out", for messages."""
    return f"{count} {'row is' if count == 1 else 'rows are'} left out"


# ------------------------------------------------------------------------------------------------ the file formats


def _jsonl(path: Path) -> TextReport:
    report = TextReport(str(path), "line")
    for number, line in _lines(path, report):
        if line.strip():
            try:
                _add(report, number, json.loads(line))
            except RecursionError:
                report.broken[number] = "nested too deeply"
            except json.JSONDecodeError as error:
                report.broken[number] = f"not JSON ({error.msg} at column {error.colno})"
    return report


def _json(path: Path) -> TextReport:
    text = _text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():
            return _jsonl(path)  # JSON lines under another name
        raise InputError(f"'{path.name}' is not JSON ({error.msg} in line {error.lineno}).") from None
    if isinstance(value, dict):
        value = next((part for part in value.values() if isinstance(part, list)), [value])
    report = TextReport(str(path))
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        _add(report, number, row)
    return report


def _table(delimiter: str) -> Callable[[Path], TextReport]:
    def read(path: Path) -> TextReport:
        report = TextReport(str(path), "line")
        reader = csv.reader(_text(path).splitlines(keepends=True), delimiter=delimiter)
        try:
            head = next(reader, [])
            if len(set(head)) != len(head) or not all(name.strip() for name in head):
                raise InputError(f"'{path.name}': its first line must name every column once, found {head}.")
            while True:
                begun = reader.line_num + 1
                values = next(reader, None)
                if values is None:
                    return report
                if not values:
                    continue
                if len(values) != len(head):
                    report.broken[begun] = f"{len(values)} values for {len(head)} columns"
                else:
                    report.rows.append(Row(begun, dict(zip(head, values, strict=True))))
        except csv.Error as error:
            raise InputError(f"'{path.name}', line {reader.line_num}: {error}.") from None

    return read


def _parquet(path: Path) -> TextReport:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingDependencyError("pyarrow", "language", "Reading .parquet files") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"'{path.name}' is not a readable parquet file ({str(error).splitlines()[0]}).") from None
    return TextReport(str(path), "row", [Row(number, row) for number, row in enumerate(rows, 1)])


def _paragraphs(path: Path) -> TextReport:
    parts = (part.strip() for part in re.split(r"\n\s*\n", _text(path)))
    rows = [Row(number, {"text": part}) for number, part in enumerate(filter(None, parts), 1)]
    return TextReport(str(path), "paragraph", rows)


_READERS: dict[str, Callable[[Path], TextReport]] = {
    ".jsonl": _jsonl, ".json": _json, ".csv": _table(","), ".tsv": _table("\t"), ".parquet": _parquet,
    ".txt": _paragraphs,
}  # fmt: skip


def _add(report: TextReport, number: int, value: Any) -> None:
    if not _writable(value):
        report.broken[number] = "it holds half of a character (a lone surrogate such as \\ud800)"
    elif isinstance(value, dict):
        report.rows.append(Row(number, value))
    else:
        report.broken[number] = f"an object with columns is expected, found {type(value).__name__}"


def _writable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(path: Path, report: TextReport) -> Iterator[tuple[int, str]]:
    """Lines with their numbers; those that are not UTF-8 are reported as broken."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    report.broken[number] = "not UTF-8 text"
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror}).") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise InputError(f"'{path.name}' is not UTF-8 text (first in line {line}): save it as UTF-8.") from None
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror}).") from None


def _hub(source: str, split: str) -> TextReport:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError("datasets", "language", "Reading data sets of the hub") from None
    try:
        table = datasets.load_dataset(source, split=split)
    except Exception as error:  # the package raises its own, the hub's and the network's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"'{source}' is not a local file, and cannot be loaded as a data set of the hub ({reason}): "
            "check the name, data_split and the network."
        ) from None
    return TextReport(source, "row", [Row(number, dict(row)) for number, row in enumerate(table, 1)])
