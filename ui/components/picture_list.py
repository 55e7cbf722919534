"""Thumbnails of kept pictures to pick from."""

from __future__ import annotations

from collections.abc import Sequence

from studio.composition.gallery import Picture
from ui import markup, pictures


def grid(found: Sequence[Picture], chosen: str = "", other: str = "") -> str:
    """The pictures as buttons (see :mod:`ui.components.pick_list`), the chosen ones marked."""
    cells = "".join(_cell(picture, picture.key in filter(None, (chosen, other))) for picture in found)
    return f'<div class="as-kept" role="list">{cells}</div>'


def _cell(picture: Picture, chosen: bool) -> str:
    words = ", ".join(filter(None, (picture.prompt, *picture.adapters, f"seed {picture.seed}")))
    star = '<i class="star" aria-label="starred">★</i>' if picture.starred else ""
    return (
        f'<button type="button" role="listitem" class="as-kept-one{" chosen" if chosen else ""}" '
        f'data-pick="{markup.text(picture.key)}" aria-pressed="{str(chosen).lower()}" title="{markup.text(words)}">'
        f'<img loading="lazy" alt="{markup.text(words)}" src="{markup.text(thumbnail(picture))}">{star}</button>'
    )


def thumbnail(picture: Picture) -> str:
    """Address of a small copy."""
    return markup.file_url(pictures.thumbnail(picture.path))
