"""Facts on distilled adapters for a composition, before anything is loaded.

Read from the metadata that :mod:`pipelines.diffusion.distillation.mark` writes, so that pages and commands need no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import InputError

EMBEDDING = "-w-embedding-"
"""Part of the name of a file that holds the guidance embedding of the LoRA beside it."""


@dataclass(frozen=True)
class Distilled:
    """How a distilled adapter is to be used.

    Attributes:
        mode: how its guidance is chosen: "fixed", "strength" (by the weight) or "embedding" (by guidance_scale).
        guidance: the guidance built in at weight 1.
        low, high: trained range of guidance.
        steps, sampler: what it is made for (0 and "" = as the base).
    """

    mode: str
    guidance: float
    low: float
    high: float
    steps: int = 0
    sampler: str = ""

    def settings(self, none: float = 1.0) -> dict[str, Any]:
        """Composition settings that suit it; ``none`` is the base's guidance_scale that does not guide."""
        chosen: dict[str, Any] = {"guidance_scale": self.guidance if self.mode == "embedding" else none}
        if self.steps:
            chosen["steps"] = self.steps
        if self.sampler:
            chosen["scheduler"] = self.sampler
        return chosen


def of(path: Path) -> Distilled | None:
    """The facts of the adapter at ``path``; None for ordinary adapters and unreadable files."""
    from adapters.formats.header import read_header
    from studio.library import facts

    try:
        return of_entries(read_header(facts.weight_file(path)).metadata)
    except (InputError, OSError):
        return None


def companion(path: Path) -> Path | None:
    """The guidance embedding that the adapter ``path`` (file or folder) names, if it exists.

    It keeps its name when the adapter is renamed, because the adapter's file names it.
    """
    from adapters.formats.header import read_header
    from studio.library import facts

    try:
        weights = facts.weight_file(path)
        name = Path(read_header(weights).metadata.get("w_embedding", "")).name
    except (InputError, OSError, ValueError):
        return None
    found = weights.with_name(name) if EMBEDDING in name else None
    return found if found is not None and found.is_file() else None


def of_entries(entries: Mapping[str, str]) -> Distilled | None:
    """The same from the metadata itself."""
    if "w_ref" not in entries and "distilled_guidance" not in entries:
        return None
    try:
        guidance = float(entries.get("w_ref") or entries["distilled_guidance"])
        return Distilled(
            mode="strength" if "w_ref" in entries else "embedding" if entries.get("w_embedding") else "fixed",
            guidance=guidance,
            low=float(entries.get("w_min", guidance)),
            high=float(entries.get("w_max", guidance)),
            steps=int(entries.get("distilled_steps", 0)),
            sampler=entries.get("distilled_sampler", ""),
        )
    except ValueError:
        return None


def sampler(values: Mapping[str, Any]) -> dict[str, Any]:
    """The sampler that suits the distilled adapter among ``values["adapters"]``, as a setting; {} if there is none."""
    return {name: value for name, value in suited(values).items() if name == "scheduler"}


def suited(values: Mapping[str, Any], none: float = 1.0) -> dict[str, Any]:
    """Settings that suit the distilled adapter among ``values["adapters"]``; {} if there is none.

    Missing adapters are skipped: loading them gives the error. ``none`` as for :meth:`Distilled.settings`.
    """
    from studio import library

    for use in values.get("adapters") or ():
        if not isinstance(use, Mapping) or use.get("weight") == 0:
            continue
        try:
            found = of(library.resolve_adapter(str(use.get("path", ""))))
        except InputError:
            continue
        if found is not None:
            return found.settings(none)
    return {}
