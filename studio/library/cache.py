"""Facts and hashes of files, remembered until a file's size or modification time changes."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from adapters import files
from studio import database
from studio.printable import without_bytes

_TABLES = """
create table if not exists facts (path text primary key, stamp text not null, facts text not null);
create table if not exists hashes (path text primary key, stamp text not null, sha256 text not null);
"""
_VERSION = 4
"""Increased when facts are gathered differently, so that older ones are not used."""


def facts(path: Path, stamp: str, gather: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``gather`` says about ``path``, from the database if ``stamp`` has not changed."""
    link = database.connection("library.db", _TABLES)
    stamp = f"{_VERSION} {stamp}"
    place = without_bytes(str(path))
    row = link.execute("select facts from facts where path = ? and stamp = ?", (place, stamp)).fetchone()
    if row is not None:
        remembered: dict[str, Any] = json.loads(row["facts"])
        return remembered
    found = gather()
    _remember("insert or replace into facts values (?, ?, ?)", (place, stamp, json.dumps(found, default=str)))
    return found


def _remember(statement: str, values: tuple[str, ...]) -> None:
    """Store what can be gathered again; a full disk only means that it will be."""
    with suppress(sqlite3.OperationalError):
        database.connection("library.db", _TABLES).execute(statement, values)


def known_sha256(path: Path) -> str | None:
    """The hash of a file or folder if it is remembered and up to date."""
    link = database.connection("library.db", _TABLES)
    place = without_bytes(str(path))
    row = link.execute("select sha256 from hashes where path = ? and stamp = ?", (place, stamp(path))).fetchone()
    return row["sha256"] if row else None


def sha256(path: Path) -> str:
    """The hash of a file, or of a folder's files (their names and hashes, sorted); remembered."""
    remembered = known_sha256(path)
    if remembered is not None:
        return remembered
    value = _folder_hash(path) if path.is_dir() else files.sha256(path)
    _remember("insert or replace into hashes values (?, ?, ?)", (without_bytes(str(path)), stamp(path), value))
    return value


def places(sha256: str) -> list[Path]:
    """Existing paths at which this hash was seen; what is there may have changed since."""
    link = database.connection("library.db", _TABLES)
    rows = link.execute("select path from hashes where sha256 = ? order by rowid desc", (sha256,))
    return [path for row in rows if (path := Path(row["path"])).exists()]


def stamp(path: Path) -> str:
    """A text that changes when the file, or any file in the folder, changes."""
    parts = []
    for file in _files(path) if path.is_dir() else [path]:
        status = file.stat()
        parts.append(f"{without_bytes(file.name)} {status.st_mtime_ns} {status.st_size}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    found = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _folder_hash(folder: Path) -> str:
    total = hashlib.sha256()
    for file in _files(folder):
        total.update(f"{without_bytes(file.relative_to(folder).as_posix())} {files.sha256(file)}\n".encode())
    return total.hexdigest()
