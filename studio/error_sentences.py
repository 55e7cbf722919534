"""Any error as one sentence for the user."""

from __future__ import annotations

import errno
import shutil
import sqlite3

from adapters.errors import StudioError


def sentence(error: BaseException) -> str:
    """What happened and what to do; unexpected errors are named as such."""
    if isinstance(error, StudioError):
        return " ".join(str(error).split())
    if disk_full(error):
        file = getattr(error, "filename", None)
        where = f" while writing '{file}'" if file else ""
        return f"The disk is full{where}: free some space (studio jobs delete, studio library trash) and try again."
    if isinstance(error, PermissionError):
        return f"No permission to use '{error.filename}': choose a place you may read and write."
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"'{error.filename}' does not exist."
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return (
            "Out of memory: choose a smaller size or batch, adapter_batch 1 for composite, or the memory preset 'low'."
        )
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"Unexpected {type(error).__name__}{': ' + first if first else ''}"


def disk_full(error: BaseException) -> bool:
    """Whether something could not be written because the disk is full."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    if isinstance(error, shutil.Error):  # of a copied folder: one entry per file
        return f"[Errno {errno.ENOSPC}]" in str(error)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def expected(error: BaseException) -> bool:
    """Whether the sentence says everything, so that nobody needs the traceback."""
    return not sentence(error).startswith("Unexpected ")
