"""Writing files and folders so that a crash or a full disk never leaves half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from adapters.errors import InputError


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Give a path beside ``target`` to write a file or folder to, and rename it to ``target`` when all went well.

    Raises:
        InputError: the disk is full or not writable; what was at ``target`` is still there.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    _remove(part)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _flush(part)
        if target.is_dir():
            _remove(target)
        os.replace(part, target)
    except (OSError, SafetensorError, RuntimeError) as error:
        _remove(part)
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"'{target}' could not be written ({reason}): free some space and resume; what was saved before is kept."
        ) from None
    except BaseException:
        _remove(part)
        raise


def _flush(path: Path) -> None:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
