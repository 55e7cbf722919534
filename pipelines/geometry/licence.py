"""Licences of weights, known without loading them or torch."""

from __future__ import annotations

import json
from pathlib import Path

from adapters.errors import InputError

NONCOMMERCIAL = "CC BY-NC-SA 4.0: not for commercial use"
PUBLIC = {
    f"naver/DUSt3R_ViTLarge_BaseDecoder_{size}": NONCOMMERCIAL for size in ("224_linear", "512_linear", "512_dpt")
}
"""Public checkpoints and the licence of their weights."""


def licence_of(source: str | Path) -> str:
    """The licence of weights: from ``config.json``, the list of public checkpoints, or the name."""
    place = Path(source)
    if (place / "config.json").is_file():
        try:
            licence = json.loads((place / "config.json").read_text("utf-8")).get("licence", "")
        except ValueError:
            licence = ""
        return str(licence) or licence_by_name(place.name)
    return PUBLIC.get(str(source)) or licence_by_name(place.name)


def licence_by_name(name: str) -> str:
    """The most likely licence of a file or folder with this name."""
    known = any(word in name.lower() for word in ("dust3r_vit", "mast3r", "croco"))
    return NONCOMMERCIAL if known else "unknown: ask the authors of these weights"


def restricted(source: str | Path) -> bool:
    """Whether the licence of these weights must be accepted before they are used."""
    return "not for commercial" in licence_of(source)


def must_accept(source: str | Path, accepted: bool) -> None:
    """Raise :class:`InputError` if the licence of these weights must be accepted and is not."""
    if restricted(source) and not accepted:
        raise InputError(
            f"The weights '{source}' are licensed under {licence_of(source)}. To accept, add --accept-licence."
        )
