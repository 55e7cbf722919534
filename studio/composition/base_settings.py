"""Steps and guidance of pictures that ask for none: measured ones, or those of the base's family and kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import assets
from adapters.errors import InputError
from pipelines.diffusion.families import FAMILIES, Family, family_of
from studio import library
from studio.composition import distilled_adapters
from studio.composition.canvas_size import family
from studio.composition.schema import ComposeConfig

MEASURED: dict[str, dict[str, float]] = {"tinymoji": {"guidance_scale": 4.0}, "tinydit": {"guidance_scale": 3.0}}
"""Base -> settings (benchmarks/results/composition_quality.md; at guidance 5 fewer subjects are recognised). Z-Image,
whose format tinydit has, counts guidance from 0: 3 there is 4 elsewhere."""

MOST = Family.usual_steps, Family.usual_guidance
"""Those of most families."""


def usual(base: str) -> tuple[int, float]:
    """The steps and guidance of a base by its family, its name and its pipeline's configuration, without opening it;
    those of most families if it is not known."""
    try:
        place, name = Path(library.resolve_base(base)), family(base)
    except InputError:
        place, name = Path(), ""
    steps, guidance = FAMILIES[name].usual_of(str(place), _index(place)) if name in FAMILIES else MOST
    return steps, _measured(base, guidance)


def of_pipeline(base: str, pipe: Any) -> tuple[int, float]:
    """As :func:`usual`, of a base that is open.

    Args:
        base: as it was named when ``pipe`` was opened.
        pipe: the diffusers pipeline.
    """
    steps, guidance = family_of(pipe).usual(pipe)
    return steps, _measured(base, guidance)


def decided(config: ComposeConfig, pipe: Any) -> dict[str, Any]:
    """Steps and guidance where ``config`` has none: what its distilled adapter was made for, else the base's own.

    Args:
        pipe: the opened :class:`pipelines.diffusion.MultiLoRAPipeline`.
    """
    usual: dict[str, Any] = dict(zip(("steps", "guidance_scale"), of_pipeline(config.base, pipe.pipe), strict=True))
    none = 1.0 if pipe.family.guidance_input else pipe.family.no_guidance
    usual |= distilled_adapters.suited(config.model_dump(include={"adapters"}), none)
    return {name: usual[name] for name in ("steps", "guidance_scale") if getattr(config, name) is None}


def _measured(base: str, guidance: float) -> float:
    """The measured guidance of an embedded base, by its name or place; ``guidance`` for others."""
    found = {name for name in MEASURED if base == name or Path(base) == assets.path(f"models/{name}")}
    return MEASURED[found.pop()]["guidance_scale"] if found else guidance


def _index(place: Path) -> dict[str, Any]:
    try:
        found = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
