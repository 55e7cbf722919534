"""The size of a picture before it is made: the frame for regions, and whether it fits in memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import InputError
from pipelines.diffusion.families import FAMILIES
from studio import devices, library
from studio.library import scan
from studio.library.base_families import usual_size

if TYPE_CHECKING:
    from studio.composition.schema import ComposeConfig


def size(base: str, width: int | None = None, height: int | None = None) -> tuple[int, int]:
    """Width and height in pixels; a missing one is the base model's own."""
    if width and height:
        return width, height
    own = _own(base)
    return width or own[0], height or own[1]


def _own(base: str) -> tuple[int, int]:
    """Width and height of what a base model makes by itself."""
    try:
        name = family(base)
    except InputError:
        name = ""
    video = FAMILIES[name].video if name in FAMILIES else None
    return (video.size[1], video.size[0]) if video else (side(base), side(base))


def following(picture: tuple[int, int], base: str, width: int | None, height: int | None) -> tuple[int, int]:
    """Width and height of the canvas for a picture of this size; a given width or height is kept.

    The picture keeps its size if its area is one to two times that of the base model's own pictures, else it is scaled
    to that area; no side gets shorter than half the base's own or longer than twice, and sides are multiples of the
    base's cell.
    """
    if width and height:
        return width, height
    wide, high = picture
    own, cell = side(base), grid(base)
    if width or height:
        scale = width / wide if width else (height or 0) / high
    else:
        scale = 1.0 if own**2 <= wide * high <= 2 * own**2 else own / math.sqrt(wide * high)

    def whole(length: float) -> int:
        return max(cell, round(min(max(length * scale, own / 2), 2 * own)) // cell * cell)

    return width or whole(wide), height or whole(high)


def grid(base: str) -> int:
    """Sides of pictures are multiples of this many pixels."""
    name = family(base)
    cells = _cell(Path(library.resolve_base(base))) or 8
    return cells * (FAMILIES[name].layout.patch if name in FAMILIES else 2)


def family(base: str) -> str:
    """The family of a local base model; empty if unknown."""
    folder = Path(library.resolve_base(base))
    return next((record.family for record in library.bases() if record.path == folder), "") or (
        scan.record(folder.absolute(), "base").family if folder.exists() else ""
    )


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
        name = family(base)
    except InputError:
        return 512
    for part in ("unet", "transformer"):
        cells, pixels = _config(folder / part).get("sample_size"), _cell(folder)
        if isinstance(cells, int) and pixels:
            return cells * pixels
    return usual_size(name)


def _cell(folder: Path) -> int:
    """Pixels along one cell of a base's latents; 0 if its files do not say."""
    config = _config(folder / "vae")
    told = config.get("scale_factor_spatial") or config.get("spatial_compression_ratio")  # of a VAE for videos
    if isinstance(told, int):
        return told
    blocks = config.get("block_out_channels")
    return int(2 ** (len(blocks) - 1)) if isinstance(blocks, list) and blocks else 0


def check_fits(config: ComposeConfig) -> None:
    """Refuse a picture that cannot fit in memory, before a model is loaded; what may fit is tried.

    Raises:
        InputError: the VAE's last layer alone exceeds the memory; names the largest size that fits.
    """
    width, height = size(config.base, config.width, config.height)
    memory = _memory(config.device)
    each = _bytes_per_pixel(config)
    if width * height * each <= memory:
        return
    longer = max(width, height)
    fitting = int(memory / each / min(width, height)) // 8 * 8
    most = f"{fitting} x {height}" if longer == width else f"{width} x {fitting}"
    if fitting < min(width, height):
        side = int((memory / each) ** 0.5) // 8 * 8
        most = f"{side} x {side}"
    raise InputError(
        f"A picture of {width} x {height} needs at least {width * height * each / 1e9:,.0f} GB of memory, there are "
        f"{memory / 1e9:,.0f}: the largest that could fit is {most}, and pictures far from the base model's own size "
        f"({side_text(config.base)}) rarely look right."
    )


def side_text(base: str) -> str:
    """The base model's own size in words."""
    width, height = _own(base)
    return f"{width} x {height}"


def _bytes_per_pixel(config: ComposeConfig) -> int:
    """Minimum bytes of one pixel: its colours, and input and output of the VAE's last layer unless tiled."""
    colours = 2 * 3 * 4
    if config.memory != "none":
        return colours
    try:
        channels = _config(Path(library.resolve_base(config.base)) / "vae").get("block_out_channels")
    except InputError:
        channels = None
    width = channels[0] if isinstance(channels, list) and channels and isinstance(channels[0], int) else 0
    number = 4 if config.dtype == "fp32" or (config.dtype == "auto" and config.device == "cpu") else 2
    return colours + 2 * width * number


def _memory(device: str) -> int:
    """Total bytes of the device's memory, within the limit of a container."""
    import psutil

    found = int(psutil.virtual_memory().total)
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found = min(found, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    name = devices.resolve(device)
    if name.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(name).total_memory)
    return found


def _config(folder: Path) -> dict[str, object]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
