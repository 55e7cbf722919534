"""The ordinary files below a folder, also through linked folders, each folder once."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import InputError


@dataclass
class Tree:
    """Files below ``folder``, sorted by name, and sentences on folders that were left out."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def name(self, file: Path) -> str:
        """The file's path below the folder, with bytes that are not text escaped."""
        return shown(file.relative_to(self.folder).as_posix())


def walk(folder: Path) -> Tree:
    """Every file below ``folder`` that is not hidden. Linked folders are followed, each folder is visited once.

    Folders come before links, so that files keep their real path when a link leads to them as well. Pipes, sockets
    and broken links are left out.

    Raises:
        InputError: the folder does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"The folder '{shown(str(folder))}' does not exist.")
    found = Tree(folder)
    seen: set[Path] = set()
    folders, links = deque([folder]), deque[Path]()
    while folders or links:
        place = folders.popleft() if folders else links.popleft()
        try:
            real = place.resolve()
            entries = sorted(os.scandir(place), key=lambda entry: entry.name) if real not in seen else None
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            found.remarks.append(f"the folder {found.name(place)} cannot be read ({reason})")
            continue
        if entries is None:
            found.remarks.append(f"the linked folder {found.name(place)} leads to one that was read already")
            continue
        seen.add(real)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = place / entry.name
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif entry.is_file():
                found.files.append(path)
            elif entry.is_symlink():
                found.remarks.append(f"the link {found.name(path)} leads nowhere")
    found.files.sort()
    return found


def shown(name: str) -> str:
    """``name`` in printable form: bytes that are not text become escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
