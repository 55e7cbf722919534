"""What the library knows about an adapter or a base model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from studio.printable import without_bytes

Source = Literal["embedded", "library", "folder"]
"""embedded: ships with the studio, read-only; library: in the home folder; folder: in a folder of the settings."""


@dataclass(frozen=True)
class Record:
    """One adapter or base model.

    Attributes:
        name: what commands and pages call it, unique within its kind.
        path: the file, or the folder when it is one.
        kind: "adapter" or "base".
        family: "sd", "sdxl", "sd3", "flux", "language", "vision-language", "rna", or "unknown".
        format: "kohya", "diffusers", "peft" ... for adapters; "diffusers", "transformers" or "single file" for bases.
        rank: the most common rank of an adapter, None for bases and for what has no rank.
        targets: the modules an adapter changes, as ``component.module`` ("unet.to_q").
        size: bytes.
        triggers: its trigger words.
        sha256: of the weights; None until :func:`studio.library.show` has read the whole file.
        recipe: how it was made, if the file says so.
        preview: its preview picture.
        source: where it was found.
        problem: why it cannot be used, empty when it can.
        modified: seconds since the epoch.
        notes: other facts by name (parameters, base, licence, description ...).
    """

    name: str
    path: Path
    kind: Literal["adapter", "base"]
    family: str = "unknown"
    format: str = ""
    rank: int | None = None
    targets: tuple[str, ...] = ()
    size: int = 0
    triggers: tuple[str, ...] = ()
    sha256: str | None = None
    recipe: dict[str, Any] | None = None
    preview: Path | None = None
    source: Source = "library"
    problem: str = ""
    modified: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def read_only(self) -> bool:
        return self.source == "embedded"

    def as_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        places = {"path": self.path, "preview": self.preview}
        shown = {name: without_bytes(str(place)) if place else None for name, place in places.items()}
        return {**asdict(self), **shown}
