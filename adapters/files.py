"""Writing files and folders so that a crash, an error or a full disk never leaves them half written."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from adapters.errors import InputError

WORDS = ".words.safetensors"
"""Suffix of a file with an adapter's words (:mod:`adapters.formats.words`)."""

WORDS_ENTRY = "adapter_studio_words"
"""Metadata entry of an adapter that lists the words in that file, as a JSON list."""

_UMASK = os.umask(0o077)
os.umask(_UMASK)


def sha256(*parts: Path) -> str:
    """SHA-256 of the content of one file, or of several in a row, as hexadecimal digits."""
    digest = hashlib.sha256()
    for file in parts:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


@contextmanager
def whole(target: Path, sync: bool = True, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` to write a file or folder to, then rename it to ``target``.

    Args:
        target: the final file or folder; an existing one is replaced, or kept if writing fails.
        sync: flush to disk first, so that not even a power cut leaves half (slow for many small files).
        private: a file that only its owner can read, also while it is written.

    Raises:
        InputError: the disk is full or not writable.
    """
    # unique, so that threads and processes may write the same file; writers depend on the suffix, so it stays
    part = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:12]}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if private:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))  # before anything is in it
        yield part
        files = [part] if part.is_file() else [file for file in part.rglob("*") if file.is_file()]
        for file in files:
            file.chmod(0o600 if private else 0o666 & ~_UMASK)  # safetensors makes files that only their owner can read
            if sync:
                _flush(file)
        if part.is_dir() and target.is_dir():
            shutil.rmtree(target)
        part.replace(target)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"'{target}' could not be written ({reason}): free some space or choose another place, and try again. "
            "An earlier version is kept."
        ) from None
    finally:
        _remove(part)


def remove_leftovers(folder: Path) -> int:
    """Remove temporary files and folders that killed processes left below ``folder``; returns their number.

    Only for folders in which nothing is being written by :func:`whole`.
    """
    found = [path for path in folder.rglob(".*") if _PART.fullmatch(path.name)]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(found)


_PART = re.compile(r"\..+\.[0-9a-f]{12}(\.[^.]+)?")


def write(target: Path, content: Callable[[Path], object], sync: bool = True, private: bool = False) -> Path:
    """Write ``target`` by one call of ``content(temporary path)``, as with :func:`whole`; returns ``target``."""
    with whole(target, sync, private) as part:
        content(part)
    return target


def write_text(target: Path, text: str, sync: bool = False) -> Path:
    """Write UTF-8 text, whole or not at all; returns ``target``."""
    return write(target, lambda part: part.write_text(text, encoding="utf-8"), sync)


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
