"""SQLite files of the studio, opened once per thread so that pages, commands and workers can share them."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path

from adapters.errors import InputError
from studio import settings

_local = threading.local()


def connection(name: str, tables: str) -> sqlite3.Connection:
    """This thread's connection (autocommit) to ``<home>/<name>``, with ``tables`` made if they are missing.

    Raises:
        InputError: the file cannot be opened.
    """
    opened: dict[tuple[int, str], sqlite3.Connection] = _local.__dict__.setdefault("opened", {})
    path = settings.folder() / name
    key = (os.getpid(), str(path))
    if key not in opened:
        opened[key] = _open(path, tables)
    return opened[key]


def _open(path: Path, tables: str) -> sqlite3.Connection:
    try:
        link = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        link.row_factory = sqlite3.Row
        # Write-ahead logging needs shared memory, which a folder shared between machines does not offer.
        link.execute(f"pragma journal_mode={'delete' if settings.load().queue_url else 'wal'}")
        link.execute("pragma synchronous=normal")
        link.executescript(tables)
    except sqlite3.Error as error:
        raise InputError(f"The studio's file '{path}' cannot be opened: {error}.") from None
    return link
