"""The result of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Written:
    """A file or folder that was written.

    Attributes:
        place: the file or folder.
        points: number of the scene's points in it.
        notes: what was renamed, converted or not found, one sentence each.
    """

    place: Path
    points: int
    notes: tuple[str, ...] = ()
