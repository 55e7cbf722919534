"""Masks of regions as pictures: from files, ``data:`` URIs and PIL images to small greyscale pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError
from pipelines import pictures
from pipelines.pictures import is_uri, to_mask

if TYPE_CHECKING:
    from PIL import Image

LARGEST = 512
"""Masks are reduced to this longest side; regions are used at the resolution of the latents."""


def open_mask(source: Any) -> Image.Image:
    """The mask as :func:`pipelines.pictures.read_mask` reads it, its longest side at most :data:`LARGEST`.

    Raises:
        InputError: it cannot be read as a picture, or nothing in it is white.
    """
    from PIL import Image

    named = isinstance(source, str | Path) and not is_uri(source)
    what = f"The mask '{str(source)[:60]}'" if named else "A region's mask"
    image = to_mask(source) if isinstance(source, Image.Image) else _read(source, what)
    if image.getextrema()[1] == 0:
        raise InputError(f"{what} is empty: nothing in it is white.")
    if max(image.width, image.height) > LARGEST:
        scale = LARGEST / max(image.width, image.height)
        image = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX
        )
    return image


def _read(source: str | Path, what: str) -> Image.Image:
    try:
        return pictures.read_mask(source).image
    except pictures.PictureError as error:
        raise InputError(f"{what} cannot be read as a picture: {error.reason}.") from None
