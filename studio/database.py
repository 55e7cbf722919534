"""SQLite files of the studio, opened once per thread so that pages, commands and workers can share them."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path

from adapters.errors import InputError
from studio import settings

_local = threading.local()


def connection(name: str, tables: str) -> sqlite3.Connection:
    """This thread's connection (autocommit) to ``<home>/<name>``; missing ``tables`` are created.

    On a full disk the file cannot be opened for writing: this call returns a copy of its contents in memory, empty if
    there is no file yet, and the next call tries again.

    Raises:
        InputError: the file cannot be opened.
    """
    opened: dict[tuple[int, str], sqlite3.Connection] = _local.__dict__.setdefault("opened", {})
    path = settings.folder() / name
    key = (os.getpid(), str(path))
    if key in opened:
        return opened[key]
    try:
        opened[key] = _open(str(path), tables, "delete" if settings.load().queue_url else "wal")
    except sqlite3.Error as error:
        if not full(path.parent):
            raise InputError(f"The studio's file '{path}' cannot be opened: {error}.") from None
        return _readable(path, tables)
    return opened[key]


def full(folder: Path) -> bool:
    """Whether the disk has no room left for the pages that SQLite needs to write anything."""
    return shutil.disk_usage(folder).free < 256 * 1024


def _open(place: str, tables: str, journal: str) -> sqlite3.Connection:
    link = sqlite3.connect(place, timeout=30, isolation_level=None, check_same_thread=False)
    link.row_factory = sqlite3.Row
    # Write-ahead logging needs shared memory, which a folder shared between machines does not offer.
    link.execute(f"pragma journal_mode={journal}")
    link.execute("pragma synchronous=normal")
    link.executescript(tables)
    return link


def _readable(path: Path, tables: str) -> sqlite3.Connection:
    """A copy of the file in memory."""
    copy = _open(":memory:", tables, "memory")
    if path.is_file() and path.stat().st_size:
        source = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)
        with closing(source), suppress(sqlite3.Error):
            source.backup(copy)
    return copy
