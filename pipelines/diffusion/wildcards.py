"""Wildcard files: ``colour.txt`` lists the choices for ``__colour__`` in a prompt, one per line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from adapters.errors import InputError, nearest


def lines_of(folder: Path | None) -> Callable[[str], Sequence[str]]:
    """A function from name to the lines of ``folder``/name.txt, without empty ones and those that begin with #.

    It raises :class:`InputError` if there is no folder or file, or the file has no such line.
    """

    def lines(name: str) -> Sequence[str]:
        if folder is None:
            raise InputError(
                f"The prompt has the wildcard __{name}__, but there is no folder of wildcards: set wildcards=FOLDER, "
                rf"or write \__{name}\__ for the characters themselves."
            )
        file = folder / f"{name}.txt"
        inside = file.resolve().is_relative_to(folder.resolve())
        if not inside or not file.is_file():
            known = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.txt")]
            raise InputError(
                f"The wildcard __{name}__ has no file{nearest(name, known)}: write one choice per line into "
                rf"{file}, or \__{name}\__ for the characters themselves."
            )
        text = file.read_text(encoding="utf-8-sig", errors="replace")
        found = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
        if not found:
            raise InputError(f"The wildcard file {name}.txt has no line to choose.")
        return found

    return lines
