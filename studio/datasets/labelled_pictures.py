"""Rows of pictures with labels: a path relative to the file, a label, and the tile's number in a strip of squares."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from adapters.errors import InputError
from pipelines import pictures
from studio.datasets.picture_questions import IMAGES
from studio.datasets.texts import Row, TextReport, left_out

LABELS = ("label", "class")
TILE = "tile"


@dataclass(frozen=True)
class LabelledPicture:
    """One row.

    Attributes:
        tile: which square of a strip it is, from the left; None for a picture of its own.
    """

    number: int
    path: Path
    label: str
    tile: int | None = None

    def open(self) -> Any:
        """The picture as RGB; raises :class:`InputError` naming the row."""
        try:
            picture = _opened(self.path)
        except pictures.PictureError as error:
            raise InputError(f"Row {self.number}: {error}") from None
        if self.tile is None:
            return picture
        side = picture.height
        if (self.tile + 1) * side > picture.width:
            raise InputError(f"Row {self.number}: '{self.path.name}' has no tile {self.tile}.")
        return picture.crop((self.tile * side, 0, (self.tile + 1) * side, side))


@lru_cache(maxsize=16)
def _opened(path: Path) -> Any:
    return pictures.open_picture(path)


def labelled(
    report: TextReport, image_column: str = "", label_column: str = "", skip_broken: bool = False
) -> list[LabelledPicture]:
    """Every row as a labelled picture whose file exists.

    Args:
        image_column, label_column: empty = one of the usual names.

    Raises:
        InputError: no such column, or rows without a label or with a missing file (the first is named).
    """
    image = _column(report, image_column, IMAGES, "pictures")
    label = _column(report, label_column, LABELS, "labels")
    home = Path(report.source).expanduser().resolve().parent
    found, wrong = [], []
    for row in report.rows:
        made = _row(row, home, image, label)
        if isinstance(made, str):
            wrong.append(f"{report.place(row.number)}: {made}")
        else:
            found.append(made)
    if wrong and not skip_broken:
        raise InputError(
            f"'{report.source}': {wrong[0]}" + (f", and {len(wrong) - 1} more rows" if len(wrong) > 1 else "")
            + ": correct them, or set skip_broken to leave them out."
        )  # fmt: skip
    if wrong:
        report.remarks.append(f"{left_out(len(wrong))} ({wrong[0]})")
    if not found:
        raise InputError(f"'{report.source}' has no picture with a label.")
    return found


def digest(rows: list[LabelledPicture]) -> str:
    """Identity of the pictures and labels."""
    total = hashlib.sha256()
    for path in sorted({row.path for row in rows}):
        total.update(path.read_bytes())
    for row in rows:
        total.update(f"{row.path.name}/{row.tile}/{row.label}\0".encode())
    return total.hexdigest()


def _row(row: Row, home: Path, image: str, label: str) -> LabelledPicture | str:
    """The row, or what is wrong with it."""
    path, name, tile = row.values.get(image), row.values.get(label), row.values.get(TILE)
    if not isinstance(path, str) or not path:
        return f"no path of a picture in '{image}'"
    if name in (None, ""):
        return f"no label in '{label}'"
    if not (place := home / path).is_file():
        return f"'{path}' does not exist"
    if tile is not None and not str(tile).isdigit():
        return f"'{TILE}' is a number from 0, not {tile!r}"
    return LabelledPicture(row.number, place, str(name), None if tile is None else int(tile))


def _column(report: TextReport, wanted: str, usual: tuple[str, ...], what: str) -> str:
    names = [wanted] if wanted else list(usual)
    found = next((name for name in names if name in report.columns), None)
    if found is None:
        raise InputError(
            f"'{report.source}' has no column of {what} ({', '.join(names)}): it has {', '.join(report.columns)}."
        )
    return found
