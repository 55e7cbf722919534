"""One way to read a picture, whichever door it comes in by: RGB with 8 bits, upright, in sRGB.

What the file says is honoured: the camera's orientation (EXIF), the colour profile (ICC), 16 bits, palettes and
transparency. What cannot be kept (further frames, a damaged profile) is said in a remark. Where a picture stands inside
a configuration it is a ``data:`` URI.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from adapters.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

HEIF = frozenset({".heic", ".heif", ".hif"})
JXL = frozenset({".jxl"})
SUFFIXES = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".mpo", ".webp", ".bmp", ".dib", ".gif",
    ".tif", ".tiff", ".avif", ".avifs", ".jp2", ".j2k", ".jpf", ".jpx", ".jpc", ".j2c", ".tga", ".pcx", ".ppm", ".pgm",
    ".pbm", ".pnm", ".pfm", ".qoi", ".ico", ".icns", ".psd", ".sgi", ".dds", *HEIF, *JXL,
})  # fmt: skip
"""Endings (in small letters) of files that are read as pictures; the content decides of which kind they are."""

UNREADABLE = frozenset({
    ".svg", ".svgz", ".eps", ".ai", ".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".orf",
    ".rw2", ".raf", ".pef", ".srw", ".x3f", ".exr", ".hdr", ".xcf", ".kra", ".wmf", ".emf", ".jxr", ".wdp", ".bpg",
    ".psb",
})  # fmt: skip
"""Endings of pictures that people have and that are not read: drawings, raw files of cameras, editors' own formats."""

LARGEST = 178_956_970
"""Pixels of the largest picture that is opened (2 GiB as 96-bit colour): more is a mistake or an attack."""

URI = "data:image/png;base64,"
"""How the ``data:`` URIs that the studio writes begin."""

_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "TGA", "PCX", "PPM", "QOI",
            "ICO", "ICNS", "PSD", "SGI", "DDS", "HEIF", "JXL")  # fmt: skip
# These hold several pictures that are no frames: a second view for the camera, layers, sizes of an icon.
_NOT_FRAMES = ("MPO", "PSD", "ICO", "ICNS", "DDS")
_SIXTEEN_BITS = 65535


@dataclass(frozen=True)
class Reading:
    """A picture in RGB, and sentences on what of the file was not kept."""

    image: Image.Image
    remarks: tuple[str, ...] = ()


def is_picture(file: Path) -> bool:
    """Whether the file's ending is one of a picture, readable or not."""
    return file.suffix.lower() in SUFFIXES | UNREADABLE


class PictureError(InputError):
    """A file that cannot be read as a picture; ``reason`` says why, without the file's name."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be read as a picture: {reason}.")
        self.reason = reason


def open_picture(source: str | Path | bytes | BinaryIO, name: str = "") -> Image.Image:
    """The picture of :func:`read`, without its remarks."""
    return read(source, name).image


def read(source: str | Path | bytes | BinaryIO, name: str = "") -> Reading:
    """Read a file, its bytes, an open stream or a ``data:`` URI as RGB with 8 bits per channel.

    Turned as the camera says; colours of an embedded profile become sRGB; 16 bits and numbers from 0 to 1 are scaled;
    transparent parts lie on white; of several frames the first one counts.

    Args:
        name: the file's name for messages (default: the path's), whose ending tells what would be needed to read it.

    Raises:
        PictureError: it is no picture, damaged, of a kind that is not read, or larger than :data:`LARGEST`.
    """
    return _read(source, name, to_rgb)


def read_mask(source: str | Path | bytes | BinaryIO, name: str = "") -> Reading:
    """Read a mask in the same way as grey ("L"): white is inside. With transparency its alpha counts (paint is inside).

    Raises:
        PictureError: as :func:`read`.
    """
    return _read(source, name, lambda picture, _: to_mask(picture))


def as_uri(image: Image.Image) -> str:
    """The picture as a ``data:`` URI of a PNG."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return URI + base64.b64encode(stream.getvalue()).decode("ascii")


def is_uri(source: object) -> bool:
    """Whether it is a ``data:`` URI and no path."""
    return isinstance(source, str) and source.startswith("data:")


def content_of(source: str | Path) -> bytes:
    """The bytes of a file or a ``data:`` URI; raises :class:`InputError` for a URI of something else, ``OSError``."""
    if not is_uri(source):
        return Path(source).expanduser().read_bytes()
    head, _, text = str(source).partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise InputError(f"a data: URI of a picture begins with '{URI}'")
    return base64.b64decode(text, validate=True)


def _read(
    source: str | Path | bytes | BinaryIO, name: str, made_of: Callable[[Image.Image, list[str]], Image.Image]
) -> Reading:
    """What ``made_of`` makes of the upright picture and the remarks so far."""
    from PIL import Image, UnidentifiedImageError

    file = Path(name or (source if isinstance(source, str | Path) and not is_uri(source) else ""))
    shown = f"'{file.name}'" if file.name else "The given data"
    try:
        content = source if isinstance(source, str | Path | bytes) else source.read()
        content = content if isinstance(content, bytes) else content_of(content)
        if file.suffix.lower() in UNREADABLE:
            raise InputError(f"{file.suffix.lower()} files are not read, save it as PNG or JPEG")
        if not content:
            raise InputError("empty file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=_formats()) as opened:
                if opened.width * opened.height > LARGEST:
                    raise Image.DecompressionBombError
                remarks = _frames(opened)
                opened.load()
                made = made_of(_upright(opened, remarks), remarks)
    except FileNotFoundError:
        raise PictureError(shown, "there is no such file") from None
    except Image.DecompressionBombError:
        raise PictureError(shown, f"it has more than {LARGEST // 10**6} million pixels") from None
    except UnidentifiedImageError:
        raise PictureError(shown, _unknown(file)) from None
    except MemoryError:
        raise PictureError(shown, "it does not fit into the memory") from None
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PictureError(shown, reason.strip().rstrip(".") or type(error).__name__) from None
    return Reading(made, tuple(remarks))


def to_rgb(picture: Image.Image, remarks: list[str] | None = None) -> Image.Image:
    """RGB in sRGB of an opened picture of any mode, transparent parts on white; ``remarks`` are added to.

    Raises:
        InputError: its numbers are floats that are neither from 0 to 1 nor whole numbers up to 255 or 65535.
    """
    from PIL import Image

    said = remarks if remarks is not None else []
    profile = picture.info.get("icc_profile")
    layer = eight_bits(picture)
    if layer.mode in ("P", "PA") or (layer.has_transparency_data and layer.mode != "LA"):
        layer = layer.convert("RGBA" if layer.has_transparency_data else "RGB")
    alpha = layer.getchannel("A") if layer.mode in ("RGBA", "LA") else None
    if alpha is not None:
        layer = layer.convert(layer.mode[:-1])
    layer = _to_srgb(layer, profile, said) if profile else layer.convert("RGB")
    if alpha is None:
        return layer
    layer.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def to_mask(picture: Image.Image) -> Image.Image:
    """Grey ("L") of an opened picture of any mode; of one with transparency its alpha."""
    layer = eight_bits(picture)
    if not layer.has_transparency_data:
        return layer.convert("L")
    alpha = layer.convert("RGBA").getchannel("A")
    return layer.convert("RGB").convert("L") if alpha.getextrema() == (255, 255) else alpha


def eight_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 or 32 bits or floats in 8 bits ("L"); any other as it is.

    Raises:
        InputError: floats that are neither from 0 to 1 nor whole numbers up to 255 or 65535.
    """
    import numpy as np
    from PIL import Image

    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture).astype(np.float64)
    made = Image.fromarray(np.rint(values / _top(values, picture.mode) * 255).clip(0, 255).astype(np.uint8))
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        made.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return made


def _top(values: Any, mode: str) -> float:
    """The number that means white."""
    import numpy as np

    if mode.startswith("I;16"):
        return _SIXTEEN_BITS
    lowest, highest = float(values.min()), float(values.max())
    if mode.startswith("I"):
        return _SIXTEEN_BITS if highest <= _SIXTEEN_BITS else 2**31 - 1
    if not np.isfinite(values).all():
        raise InputError("some of its numbers are not finite")
    if lowest >= 0 and highest <= 1:
        return 1
    whole = bool((values == np.rint(values)).all())
    if lowest < 0 or highest > _SIXTEEN_BITS or not whole:
        raise InputError(f"its numbers go from {lowest:.4g} to {highest:.4g}; floats are read from 0 to 1")
    return 255 if highest <= 255 else _SIXTEEN_BITS


def _frames(opened: Image.Image) -> list[str]:
    count = 1 if opened.format in _NOT_FRAMES else getattr(opened, "n_frames", 1)
    opened.seek(0)
    return [f"the first of {count} frames is used"] if count > 1 else []


def _upright(opened: Image.Image, remarks: list[str]) -> Image.Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(opened)
    except Exception:  # the picture itself is sound
        remarks.append("its EXIF data is damaged, so it is not turned")
        return opened


def _to_srgb(picture: Image.Image, profile: bytes, remarks: list[str]) -> Image.Image:
    """Colours of the profile as sRGB; a profile that changes nothing by more than one level changes nothing at all."""
    from PIL import ImageCms

    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = given.profile.xcolor_space.strip()
        source = picture if {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space) == picture.mode else None
        if source is None and space == "RGB" and picture.mode in ("L", "1"):
            source = picture.convert("RGB")
        if source is None:
            raise ImageCms.PyCMSError(f"a profile for {space} in a picture of mode {picture.mode}")
        change = ImageCms.buildTransform(given, _srgb(), source.mode, "RGB")
        probe = _probe(source.mode)
        if probe is not None and _close(ImageCms.applyTransform(probe, change), probe.convert("RGB")):
            return picture.convert("RGB")
        made = ImageCms.applyTransform(source, change)
        assert made is not None
        return made
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        remarks.append("its colour profile cannot be used, so its numbers are taken as sRGB")
        return picture.convert("RGB")


@cache
def _srgb() -> Any:
    from PIL import ImageCms

    return ImageCms.createProfile("sRGB")


@cache
def _probe(mode: str) -> Image.Image | None:
    """Colours over the whole space, to see whether a profile says anything new."""
    import numpy as np
    from PIL import Image

    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    if mode == "L":
        return Image.fromarray(steps[None])
    if mode != "RGB":
        return None
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(18, -1, 3))


def _close(one: Image.Image | None, other: Image.Image) -> bool:
    import numpy as np

    return int(np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16)).max()) <= 1


@cache
def _formats() -> list[str]:
    """Kinds that may be opened. Others stay shut: some start programs (EPS) or are no pictures."""
    from PIL import Image

    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401  (registers itself)
    return [kind for kind in _FORMATS if kind in Image.OPEN]


def _unknown(file: Path) -> str:
    suffix = file.suffix.lower()
    for endings, kind, package in ((HEIF, "HEIF", "pillow-heif"), (JXL, "JXL", "pillow-jxl-plugin")):
        if suffix in endings and kind not in _formats():
            return (f"{suffix} files need the package '{package}' (pip install 'adapter-studio[pictures]'), "
                    "or save it as PNG or JPEG")  # fmt: skip
    return "its content is of no known kind"
