"""Finding, checking and reading the pictures of a folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from adapters.errors import InputError
from studio.datasets.buckets import Placement, Size
from studio.datasets.captions import read_captions

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})


@dataclass(frozen=True)
class Picture:
    """One usable picture: its file, size in pixels, caption (None = it has none) and SHA-256 of its bytes."""

    path: Path
    size: Size
    caption: str | None
    digest: str


@dataclass
class FolderReport:
    """What is in a folder of pictures.

    Attributes:
        pictures: the usable ones, sorted by name.
        broken: file name -> what is wrong with it.
        uncaptioned: names of usable pictures without a caption.
    """

    folder: Path
    pictures: list[Picture] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    uncaptioned: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """SHA-256 over every picture and caption: the identity of the data set."""
        total = hashlib.sha256()
        for picture in self.pictures:
            total.update(f"{picture.digest}\0{picture.caption}\0".encode())
        return total.hexdigest()


def scan(folder: Path) -> FolderReport:
    """Look at every picture below ``folder`` (hidden files excepted).

    Raises:
        InputError: the folder does not exist, or captions cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"The picture folder '{folder}' does not exist.")
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    captions = read_captions(folder, files)
    report = FolderReport(folder)
    for file in files:
        name = file.relative_to(folder).as_posix()
        try:
            content = file.read_bytes()
            if not content:
                raise InputError("empty file")
            size = open_picture(file).size
        except (InputError, OSError) as error:
            report.broken[name] = str(error)
            continue
        caption = captions.get(file)
        if caption is None:
            report.uncaptioned.append(name)
        report.pictures.append(Picture(file, size, caption, hashlib.sha256(content).hexdigest()))
    return report


def usable_pictures(folder: Path, *, skip_broken: bool = False, need_captions: bool = False) -> FolderReport:
    """:func:`scan`, refusing what cannot be trained on.

    Raises:
        InputError: no pictures; broken ones (unless ``skip_broken``); missing captions (if ``need_captions``).
    """
    report = scan(folder)
    if report.broken and not skip_broken:
        shown = "; ".join(f"{name} ({reason})" for name, reason in list(report.broken.items())[:5])
        raise InputError(
            f"{len(report.broken)} pictures in '{folder}' cannot be read: {shown}. "
            "Replace them, or set skip_broken to leave them out."
        )
    if not report.pictures:
        raise InputError(f"There are no pictures in '{folder}' (looked for {', '.join(sorted(SUFFIXES))}).")
    if need_captions and report.uncaptioned:
        raise InputError(
            f"{len(report.uncaptioned)} pictures in '{folder}' have no caption: {', '.join(report.uncaptioned[:5])}. "
            "Write NAME.txt beside each or a metadata.jsonl, or set allow_missing_captions."
        )
    return report


def open_picture(file: Path) -> Image.Image:
    """Read a picture as RGB, turned as its camera says, transparency on white.

    Raises:
        InputError: it is not a picture, is damaged, or is too large to be trusted.
    """
    try:
        with Image.open(file) as opened:
            turned = ImageOps.exif_transpose(opened)
            return flatten(turned)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"not a readable picture: {error}".replace(str(file), file.name)) from None


def flatten(picture: Image.Image) -> Image.Image:
    """RGB, with transparent parts on white."""
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def read_pixels(file: Path, placement: Placement, flip: bool) -> torch.Tensor:
    """Pixels ``(3, height, width)`` in [-1, 1] of a picture, resized, cut and (if ``flip``) mirrored."""
    try:
        picture = open_picture(file)
    except InputError as error:
        raise InputError(f"'{file}' is {error}.") from None
    if picture.size != placement.resized:
        picture = picture.resize(placement.resized, Image.Resampling.LANCZOS)
    width, height = placement.size
    picture = picture.crop((placement.left, placement.top, placement.left + width, placement.top + height))
    if flip:
        picture = ImageOps.mirror(picture)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(127.5).sub(1.0)
