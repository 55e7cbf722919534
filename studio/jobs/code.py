"""A fingerprint of the package's code on disk, so that a running process notices an update."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("adapters", "assets", "pipelines", "studio")
"""What a worker runs; it does not use the pages."""


def fingerprint(root: Path = ROOT) -> str:
    """Changes when a module of :data:`PACKAGES` below ``root`` is changed, added or removed."""
    found = (file for package in PACKAGES for file in (root / package).rglob("*.py"))
    lines = sorted(f"{file.relative_to(root).as_posix()} {_stamp(file)}" for file in found)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _stamp(file: Path) -> str:
    try:
        status = file.stat()
    except OSError:  # removed since it was listed
        return "gone"
    return f"{status.st_mtime_ns} {status.st_size}"
