"""Masks as pictures: files, ``data:`` URIs and PIL images in, one small greyscale picture out.

White is inside. A picture with transparency counts by its alpha (a painted layer: paint is inside).
"""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError
from pipelines.pictures import eight_bits

if TYPE_CHECKING:
    from PIL import Image

PREFIX = "data:image/"
LARGEST = 512
"""Longest side that is kept of a mask; regions are used at the resolution of the latents."""


def open_mask(source: Any) -> Image.Image:
    """The mask as a greyscale ("L") picture, its longest side at most :data:`LARGEST`.

    Raises:
        InputError: no readable picture, or one with nothing inside.
    """
    from PIL import Image

    what = "A region's mask" if not isinstance(source, str | Path) else f"The mask '{str(source)[:60]}'"
    image = eight_bits(source if isinstance(source, Image.Image) else _read(source, what))
    if image.has_transparency_data:
        alpha: Any = image.convert("RGBA").getchannel("A")
        image = alpha if alpha.getextrema()[0] < 255 else image.convert("RGB")
    image = image.convert("L")
    if image.getextrema()[1] == 0:
        raise InputError(f"{what} is empty: nothing in it is white.")
    if max(image.width, image.height) > LARGEST:
        scale = LARGEST / max(image.width, image.height)
        image = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX
        )
    return image


def as_uri(image: Image.Image) -> str:
    """The picture as a ``data:`` URI of a PNG, to be kept in a configuration."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _read(source: str | Path, what: str) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(source, str) and source.startswith("data:"):
            head, _, text = source.partition(",")
            if not head.startswith(PREFIX) or not head.endswith(";base64"):
                raise InputError(f"{what} is no picture: a data: URI must begin with 'data:image/png;base64,'.")
            stream: Any = io.BytesIO(base64.b64decode(text, validate=True))
        else:
            stream = Path(source).expanduser()
            if not stream.is_file():
                raise InputError(f"{what} does not exist.")
        with Image.open(stream) as image:
            image.load()
            return image.copy()
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,
        binascii.Error,
        Image.DecompressionBombError,
    ) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what} cannot be read as a picture.") from None
