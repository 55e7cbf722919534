"""The size of a picture before it is made: what a page draws regions on."""

from __future__ import annotations

import json
from pathlib import Path

from adapters.errors import InputError
from studio import library
from studio.library.base_families import usual_size


def size(base: str, width: int | None = None, height: int | None = None) -> tuple[int, int]:
    """Width and height in pixels; what is not given is the base model's own side."""
    if width and height:
        return width, height
    own = side(base)
    return width or own, height or own


SMALL = 256
"""Pixels of a side up to which a base draws one subject per square, so that two need twice the width."""


def wide(base: str, subjects: int) -> tuple[int, int]:
    """Width and height of a picture of several subjects side by side that the base still draws well.

    A small base (the embedded one was trained on 2 : 1) gets twice its side; one of Stable Diffusion 1.5's size gets
    3 : 2, where it does not yet repeat itself; larger ones a shape that they were trained on, of about a megapixel.
    """
    own = side(base)
    if subjects < 2:
        return own, own
    if own <= SMALL:
        return 2 * own, own
    if own < 1024:
        return own * 3 // 2 // 64 * 64, own
    return (1216, 832) if subjects == 2 else (1344, 768)


def side(base: str) -> int:
    """The side of the square pictures that a base model makes by itself."""
    try:
        folder = Path(library.resolve_base(base))
        family = next((record.family for record in library.bases() if record.path == folder), "")
    except InputError:
        return 512
    for part in ("unet", "transformer"):
        cells = _config(folder / part).get("sample_size")
        blocks = _config(folder / "vae").get("block_out_channels")
        if isinstance(cells, int) and isinstance(blocks, list) and blocks:
            return int(cells * 2 ** (len(blocks) - 1))
    return usual_size(family)


def _config(folder: Path) -> dict[str, object]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
