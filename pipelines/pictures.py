"""The reader of all pictures: 8-bit RGB, upright, in sRGB.

It honours the camera's orientation (EXIF), the colour profile (ICC), 16 bits, palettes and transparency. What cannot be
kept (further frames, a damaged profile) is reported in a remark. Inside a configuration a picture is a ``data:`` URI.
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
"""Suffixes (lower case) of files that are read as pictures; the format is detected from the content."""

UNREADABLE = frozenset({
    ".svg", ".svgz", ".eps", ".ai", ".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".orf",
    ".rw2", ".raf", ".pef", ".srw", ".x3f", ".exr", ".hdr", ".xcf", ".kra", ".wmf", ".emf", ".jxr", ".wdp", ".bpg",
    ".psb",
})  # fmt: skip
"""Suffixes of pictures that are not supported: vector graphics, camera raw files, editors' own formats."""

LARGEST = 178_956_970
"""Pixels of the largest picture that is opened (2 GiB as 96-bit colour); more is a mistake or an attack."""

URI = "data:image/png;base64,"
"""Prefix of the ``data:`` URIs that the studio writes."""

_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "TGA", "PCX", "PPM", "QOI",
            "ICO", "ICNS", "PSD", "SGI", "DDS", "HEIF", "JXL")  # fmt: skip
# The further pictures in these are not frames: a second view, layers, sizes of an icon.
_NOT_FRAMES = ("MPO", "PSD", "ICO", "ICNS", "DDS")
_SIXTEEN_BITS = 65535


@dataclass(frozen=True)
class Reading:
    """A picture (RGB, or "L" for a mask), and remarks on what of the file was not kept."""

    image: Image.Image
    remarks: tuple[str, ...] = ()


def is_picture(file: Path) -> bool:
    """Whether the file's suffix is one of a picture, supported or not."""
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

    Turned upright; converted from an embedded profile to sRGB; 16 bits and floats from 0 to 1 are scaled; transparent
    parts are put on white; of several frames the first is used.

    Args:
        name: the file's name for messages (default: that of the path); by its suffix a message can name the package
            that is missing.

    Raises:
        PictureError: it is not a picture, damaged, of an unsupported format, or larger than :data:`LARGEST`.
    """
    return _read(source, name, to_rgb)


def read_mask(source: str | Path | bytes | BinaryIO, name: str = "") -> Reading:
    """Read a mask in the same way, as grey ("L"): white is inside. If it has transparency, its alpha is the mask.

    Raises:
        PictureError: as :func:`read`.
    """
    return _read(source, name, lambda picture, _: to_mask(picture))


def as_uri(image: Image.Image) -> str:
    """The picture as a PNG in a ``data:`` URI."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return URI + base64.b64encode(stream.getvalue()).decode("ascii")


def is_uri(source: object) -> bool:
    """Whether it is a ``data:`` URI rather than a path."""
    return isinstance(source, str) and source.startswith("data:")


def content_of(source: str | Path) -> bytes:
    """The bytes of a file or a ``data:`` URI.

    Raises:
        InputError: a URI that is not of a picture in base64.
        OSError: the file cannot be read.
    """
    if not is_uri(source):
        return Path(source).expanduser().read_bytes()
    head, _, text = str(source).partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise InputError(f"a data: URI of a picture begins with '{URI}'")
    return base64.b64decode(text, validate=True)


def _read(
    source: str | Path | bytes | BinaryIO, name: str, made_of: Callable[[Image.Image, list[str]], Image.Image]
) -> Reading:
    """The result of ``made_of(upright picture, remarks)``, which may add remarks."""
    from PIL import Image, UnidentifiedImageError

    file = Path(name or (source if isinstance(source, str | Path) and not is_uri(source) else ""))
    shown = f"'{file.name}'" if file.name else "The given data"
    try:
        content = source if isinstance(source, str | Path | bytes) else source.read()
        content = content if isinstance(content, bytes) else content_of(content)
        if file.suffix.lower() in UNREADABLE:
            raise InputError(f"{file.suffix.lower()} files are not supported; save it as PNG or JPEG")
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
    except Exception as error:  # damaged files make decoders raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PictureError(shown, reason.strip().rstrip(".") or type(error).__name__) from None
    return Reading(made, tuple(remarks))


def to_rgb(picture: Image.Image, remarks: list[str] | None = None) -> Image.Image:
    """An opened picture of any mode as RGB in sRGB, transparent parts on white; may append to ``remarks``.

    Raises:
        InputError: its values are floats that are neither from 0 to 1 nor whole numbers up to 65535.
    """
    from PIL import Image

    remarks = remarks if remarks is not None else []
    profile = picture.info.get("icc_profile")
    layer = eight_bits(picture)
    if layer.mode in ("P", "PA") or (layer.has_transparency_data and layer.mode != "LA"):
        layer = layer.convert("RGBA" if layer.has_transparency_data else "RGB")
    alpha = layer.getchannel("A") if layer.mode in ("RGBA", "LA") else None
    if alpha is not None:
        layer = layer.convert(layer.mode[:-1])
    layer = _to_srgb(layer, profile, remarks) if profile else layer.convert("RGB")
    if alpha is None:
        return layer
    layer.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def to_mask(picture: Image.Image) -> Image.Image:
    """An opened picture of any mode as grey ("L"); one with transparency as its alpha."""
    layer = eight_bits(picture)
    if not layer.has_transparency_data:
        return layer.convert("L")
    alpha = layer.convert("RGBA").getchannel("A")
    return layer.convert("RGB").convert("L") if alpha.getextrema() == (255, 255) else alpha


def eight_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 or 32 bits or floats in 8 bits ("L"); any other unchanged.

    Raises:
        InputError: its values are floats that are neither from 0 to 1 nor whole numbers up to 65535.
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
    """The value of white."""
    import numpy as np

    if mode.startswith("I;16"):
        return _SIXTEEN_BITS
    lowest, highest = float(values.min()), float(values.max())
    if mode.startswith("I"):
        return _SIXTEEN_BITS if highest <= _SIXTEEN_BITS else 2**31 - 1
    if not np.isfinite(values).all():
        raise InputError("some of its values are not finite")
    if lowest >= 0 and highest <= 1:
        return 1
    whole = bool((values == np.rint(values)).all())
    if lowest < 0 or highest > _SIXTEEN_BITS or not whole:
        raise InputError(f"its values go from {lowest:.4g} to {highest:.4g}; floats must be from 0 to 1")
    return 255 if highest <= 255 else _SIXTEEN_BITS


def _frames(opened: Image.Image) -> list[str]:
    count = 1 if opened.format in _NOT_FRAMES else getattr(opened, "n_frames", 1)
    opened.seek(0)
    return [f"the first of {count} frames is used"] if count > 1 else []


def _upright(opened: Image.Image, remarks: list[str]) -> Image.Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(opened)
    except Exception:  # the pixels are still usable
        remarks.append("its EXIF data is damaged, so it is not turned upright")
        return opened


def _to_srgb(picture: Image.Image, profile: bytes, remarks: list[str]) -> Image.Image:
    """The picture converted from ``profile`` to sRGB; a profile within one level of sRGB is ignored."""
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
        remarks.append("its colour profile cannot be used, so its values are taken as sRGB")
        return picture.convert("RGB")


@cache
def _srgb() -> Any:
    from PIL import ImageCms

    return ImageCms.createProfile("sRGB")


@cache
def _probe(mode: str) -> Image.Image | None:
    """Colours over the whole space, to compare a profile with sRGB."""
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
    """Pillow's formats that may be opened. Others are not: some start programs (EPS) or are not pictures."""
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
    return "its content is of no known format"
