"""Dropped files, kept where jobs find them later."""

from __future__ import annotations

import shutil
from pathlib import Path

from adapters import files
from studio import settings


def keep(file: str | Path, kind: str) -> Path:
    """Copy a dropped file, whole or not at all, under the hash of its content; the same file is kept once.

    Args:
        kind: begins the name of its folder ("rows", "sound" ...).
    """
    source = Path(file)
    target = settings.folder("datasets", f"{kind}-{files.sha256(source)[:12]}") / source.name
    return target if target.is_file() else copy(source, target)


def copy(source: Path, target: Path) -> Path:
    """Copy a file, whole or not at all; returns ``target``."""
    return files.write(target, lambda part: shutil.copyfile(source, part), sync=False)
