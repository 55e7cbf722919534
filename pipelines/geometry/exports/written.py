"""What an export says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Written:
    """A file or folder that was written.

    Attributes:
        points: how many of the scene's points are in it.
        notes: what a person should know, one sentence each.
    """

    place: Path
    points: int
    notes: tuple[str, ...] = ()
