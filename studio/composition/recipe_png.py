"""Pictures that carry their recipe: PNG files whose text chunk ``adapter-studio`` holds it as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import files
from adapters.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

CHUNK = "adapter-studio"


def save_png(image: Image.Image, path: Path, recipe: dict[str, Any]) -> Path:
    """Write ``image`` with its recipe, completely or not at all, and return ``path``."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(CHUNK, json.dumps(recipe))  # plain ASCII: other characters become \\u escapes
    return files.write(path, lambda part: image.save(part, format="PNG", pnginfo=info), sync=False)


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe in a picture, or in a recipe.json; of earlier versions, with what they had no word for.

    Raises:
        InputError: the file is missing, not a picture, or has no recipe.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"'{path}' does not exist.")
    text = _json_text(file) if file.suffix.lower() == ".json" else _png_text(file)
    try:
        recipe = json.loads(text)
    except RecursionError:
        raise InputError(f"The recipe in '{path}' is damaged: {_TOO_DEEP}.") from None
    except ValueError:  # not JSON, or a number of thousands of digits
        raise InputError(f"The recipe in '{path}' is damaged: it is not JSON.") from None
    if not _shallow(recipe):
        raise InputError(f"The recipe in '{path}' is damaged: {_TOO_DEEP}.")
    if not isinstance(recipe, dict) or not isinstance(recipe.get("config"), dict):
        raise InputError(f"The recipe in '{path}' is damaged: it has no 'config'.")
    if recipe.get("job") == "compose":
        recipe["config"].setdefault("fold", False)  # drawn before there was such a thing, to be repeated to the bit
    return recipe


_DEPTH = 40
_TOO_DEEP = "its lists are nested deeper than any recipe's"
_LARGEST = 64 * 2**20
"""Maximum bytes of a recipe.json; masks, its largest part, take far less."""


def _shallow(value: Any) -> bool:
    """Whether lists and mappings are nested at most ``_DEPTH`` deep."""
    level = [value]
    for _ in range(_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return not level


def _json_text(file: Path) -> str:
    if file.stat().st_size > _LARGEST:
        raise InputError(f"'{file}' is not a recipe: it has more than {_LARGEST >> 20} MB.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"The recipe in '{file}' is damaged: it is not text.") from None


def _png_text(file: Path) -> str:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            image.load()  # text may also come after the pixels
            text = getattr(image, "text", {}).get(CHUNK)
    except (Image.DecompressionBombError, MemoryError):
        raise InputError(
            f"'{file}' has too many pixels to be read: Adapter Studio makes no pictures as large."
        ) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise InputError(f"'{file}' cannot be read as a picture.") from None
    if not isinstance(text, str):
        raise InputError(
            f"'{file}' has no recipe: only PNG files as Adapter Studio wrote them do (other programs drop it)."
        )
    return text
