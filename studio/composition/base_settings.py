"""Settings that suit a base: measured ones, those of its family and kind, or the schema's defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapters.errors import InputError
from pipelines.diffusion.families import FAMILIES
from studio import library
from studio.composition.canvas_size import family
from studio.composition.schema import ComposeConfig

MEASURED: dict[str, dict[str, float]] = {"tinymoji": {"guidance_scale": 4.0}, "tinydit": {"guidance_scale": 3.0}}
"""Base -> settings (benchmarks/results/composition_quality.md; at guidance 5 fewer subjects are recognised). Z-Image,
whose format tinydit has, counts guidance from 0: 3 there is 4 elsewhere."""


def steps(base: str) -> int:
    """Initial number of steps for a base."""
    return usual(base)[0]


def guidance(base: str) -> float:
    """Initial guidance for a base."""
    return MEASURED.get(base, {}).get("guidance_scale", usual(base)[1])


def usual(base: str) -> tuple[int, float]:
    """The usual steps and guidance of a base by its family, its name and its pipeline's configuration."""
    fields = ComposeConfig.model_fields
    default = int(fields["steps"].default), float(fields["guidance_scale"].default)
    try:
        place, name = Path(library.resolve_base(base)), family(base)
    except InputError:
        return default
    return FAMILIES[name].usual_of(str(place), _index(place)) if name in FAMILIES else default


def _index(place: Path) -> dict[str, Any]:
    try:
        found = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
