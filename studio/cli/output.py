"""What commands print: results for people or, with ``--json``, for machines on stdout; everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

import typer

from studio.printable import printable

_FILE_WIDTH = 160
"""Columns of a table that goes to a file or another program."""

Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.", rich_help_panel="Output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks.", rich_help_panel="Output")]


@dataclass(frozen=True)
class Output:
    """Where a command writes."""

    json: bool = False
    quiet: bool = False

    def result(self, data: Any, text: Callable[[], Any] | str) -> None:
        """Print the result: ``data`` as JSON, or ``text`` (a string, or a function giving one or a rich renderable)."""
        if self.json:
            print(json.dumps(data, indent=1, default=str), flush=True)  # also to a file, while the app runs on
            return
        shown = text() if callable(text) else text
        if isinstance(shown, str):
            print(printable(shown, lines=True), flush=True)
        elif shown:
            from rich.console import Console

            Console(width=None if sys.stdout.isatty() else _FILE_WIDTH).print(shown)

    def note(self, text: str) -> None:
        """Print a remark on stderr, unless ``quiet``."""
        if not self.quiet:
            print(printable(text, lines=True), file=sys.stderr)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Any:
    """A table without frames; the first column stays whole, long cells of the others wrap."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, no_wrap=number == 0, overflow="fold" if number == 0 else "ellipsis")
    for row in rows:
        made.add_row(*(_cell(value) for value in row))
    return made


def facts(pairs: Iterable[tuple[str, Any]]) -> Any:
    """Two columns, name and value; empty values are left out."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, show_header=False)
    for name, value in pairs:
        if value not in (None, "", (), [], {}):
            made.add_row(f"[bold]{_cell(name)}[/]", _cell(value))
    return made


def size(number: float) -> str:
    """A number of bytes, readable ("1.2 MB")."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def moment(seconds: float | None) -> str:
    """Seconds since the epoch as local date and time."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M") if seconds else ""


def duration(seconds: float | None) -> str:
    """Seconds as "12.3 s", "4:05" or "1:04:05"."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def lines(text: str) -> Any:
    """Text of several lines as a cell of :func:`facts`."""
    from rich.text import Text

    return Text(printable(text, lines=True))


def _cell(value: Any) -> Any:
    from rich.markup import escape
    from rich.text import Text

    if isinstance(value, Text):
        return value
    if isinstance(value, (list, tuple)):
        value = ", ".join(str(item) for item in value)
    return "" if value is None else escape(printable(value))
