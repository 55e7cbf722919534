"""The comparison job: the same picture by several methods, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import files
from adapters.errors import InputError
from adapters.progress import Monitor
from studio import catalogue
from studio.composition import series
from studio.composition.comparison_schema import CompareConfig
from studio.composition.series import One

if TYPE_CHECKING:
    from PIL import Image

GRID = "comparison.png"
CELL, LABEL, GAP = 256, 30, 12
"""Sizes of the grid, in pixels; larger pictures keep their own size."""


def run(config: CompareConfig, folder: Path, monitor: Monitor) -> dict[str, Any]:
    """Make one picture per method in ``folder/METHOD`` (each with its recipe), and a labelled grid of all.

    A method that cannot work with these adapters or regions is left out, and its reason is in ``result["skipped"]``.

    Raises:
        adapters.errors.InputError: no method can make the picture.
        adapters.errors.Cancelled: ``monitor`` asked to stop; finished pictures are kept.
    """
    begun = time.monotonic()
    results, skipped = series.run(
        {name: One(title(name), config.of(name), folder / name) for name in config.methods}, monitor
    )
    made = {name: result["images"][0] for name, result in results.items()}
    if not made:
        raise InputError("None of the methods can make this picture. " + " ".join(_reasons(skipped)))
    drawn = grid([Path(path) for path in made.values()], [title(name) for name in made])
    files.write(folder / GRID, lambda part: drawn.save(part, format="PNG"), sync=False)
    return {
        "images": list(made.values()),
        "methods": list(made),
        "skipped": skipped,
        "regions": {name: result["regions"] for name, result in results.items()},
        "grid": str(folder / GRID),
        "base": config.base,
        "remarks": series.remarks(results),
        "seconds": round(time.monotonic() - begun, 3),
    }


def title(name: str) -> str:
    """The display name of a method."""
    return next((method.title or name for method in catalogue.stage("compose") if method.name == name), name)


def grid(pictures: Sequence[Path], labels: Sequence[str]) -> Image.Image:
    """The pictures side by side with labels below, in rows of about the same length."""
    from PIL import Image, ImageDraw, ImageFont

    opened = [Image.open(path).convert("RGB") for path in pictures]
    zoom = max(1, CELL // max(opened[0].size))
    width, height = (side * zoom for side in opened[0].size)
    columns = min(len(opened), 4 if len(opened) > 6 else 3)
    rows = -(-len(opened) // columns)
    sheet = Image.new("RGB", (GAP + columns * (width + GAP), GAP + rows * (height + LABEL + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for number, (picture, label) in enumerate(zip(opened, labels, strict=True)):
        left = GAP + number % columns * (width + GAP)
        top = GAP + number // columns * (height + LABEL + GAP)
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.text((left + width / 2, top + height + LABEL / 2), label, fill="black", font=font, anchor="mm")
    return sheet


def _reasons(skipped: dict[str, str]) -> list[str]:
    """Every reason once, with the methods that gave it."""
    told: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        told.setdefault(reason, []).append(title(name))
    return [f"{', '.join(names)}: {reason}" for reason, names in told.items()]
