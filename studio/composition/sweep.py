"""The sweep job: pictures over the values of one or several settings, in one labelled grid.

Every picture is made alone, on one loaded model, so that its recipe repeats it to the bit. In batches they are made
faster, but alone each is then the same only up to rounding (in fp32 at most 3e-5 of the range of a pixel).
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import files
from adapters.errors import InputError
from adapters.progress import Monitor
from studio.composition import series
from studio.composition.series import One
from studio.composition.sweep_schema import SweepConfig

if TYPE_CHECKING:
    from PIL import Image

GRID = "sweep.png"
CELL, LEFT, TOP, GAP = 192, 150, 34, 6
"""Smallest side of a cell, room for the labels, and the distance between cells, in pixels."""


def run(config: SweepConfig, folder: Path, monitor: Monitor) -> dict[str, Any]:
    """Make one picture per combination in ``folder/NNN`` (each with its recipe), and ``sweep.png`` with all.

    A combination that cannot be made is left out, and its reason is in ``result["skipped"]``.

    Raises:
        adapters.errors.InputError: none can be made.
        adapters.errors.Cancelled: ``monitor`` asked to stop; finished pictures are kept.
    """
    begun = time.monotonic()
    wanted = list(config.combinations())
    results, skipped = series.run(
        {labels: One(", ".join(labels), one, folder / f"{number:03d}") for number, (labels, one) in enumerate(wanted)},
        monitor,
        config.batch,
    )
    made = {labels: Path(result["images"][0]) for labels, result in results.items()}
    if not made:
        raise InputError("None of the pictures can be made. " + next(iter(skipped.values())))
    drawn = grid([labels for labels, _ in wanted], made, len(config.axes[-1].values))
    files.write(folder / GRID, lambda part: drawn.save(part, format="PNG"), sync=False)
    return {
        "images": [str(path) for path in made.values()],
        "labels": {path.parent.name: ", ".join(labels) for labels, path in made.items()},
        "skipped": {", ".join(labels): reason for labels, reason in skipped.items()},
        "grid": str(folder / GRID),
        "base": config.base,
        "remarks": series.remarks(results),
        "seconds": round(time.monotonic() - begun, 3),
    }


def grid(wanted: list[tuple[str, ...]], made: dict[tuple[str, ...], Path], columns: int) -> Image.Image:
    """The pictures in rows of ``columns``, labelled at the top (last axis) and at the left (the others)."""
    from PIL import Image, ImageDraw, ImageFont

    with Image.open(next(iter(made.values()))) as first:
        size = first.size
    zoom = max(1, math.ceil(CELL / max(size)))
    width, height = (side * zoom for side in size)
    rows, left = len(wanted) // columns, LEFT if len(wanted[0]) > 1 else GAP
    sheet = Image.new("RGB", (left + columns * (width + GAP), TOP + rows * (height + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for number, labels in enumerate(wanted):
        row, column = divmod(number, columns)
        x, y = left + column * (width + GAP), TOP + row * (height + GAP)
        if row == 0:
            pen.text((x + width / 2, TOP / 2), labels[-1], fill="black", font=font, anchor="mm")
        if column == 0 and len(labels) > 1:
            pen.multiline_text((GAP, y + height / 2), "\n".join(labels[:-1]), fill="black", font=font, anchor="lm")
        if labels in made:
            with Image.open(made[labels]) as picture:
                sheet.paste(picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (x, y))
    return sheet
