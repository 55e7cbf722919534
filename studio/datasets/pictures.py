"""Finding, checking and reading the pictures of a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import InputError
from pipelines.pictures import SUFFIXES, PictureError, content_of, is_picture, open_picture, read
from studio.datasets.buckets import Placement, Size
from studio.datasets.captions import is_caption, read_captions
from studio.datasets.folders import Tree, walk

if TYPE_CHECKING:
    import torch


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
        remarks: sentences on what is not used, or not used as it is.
    """

    folder: Path
    pictures: list[Picture] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    uncaptioned: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """SHA-256 over every picture and caption: the identity of the data set."""
        total = hashlib.sha256()
        for picture in self.pictures:
            total.update(f"{picture.digest}\0{picture.caption}\0".encode())
        return total.hexdigest()


__all__ = ["SUFFIXES", "FolderReport", "Picture", "PictureError", "content_of", "is_picture", "open_picture", "read",
           "read_pixels", "scan", "usable_pictures"]  # fmt: skip


def scan(folder: Path) -> FolderReport:
    """Look at every picture below ``folder`` (hidden files excepted), in linked folders too.

    Raises:
        InputError: the folder does not exist, or captions cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"The picture folder '{folder}' does not exist.")
    tree = walk(folder)
    files = [file for file in tree.files if is_picture(file)]
    captions = read_captions(folder, files, tree.files)
    report = FolderReport(folder, remarks=[*tree.remarks, *captions.remarks])
    for file in files:
        name = tree.name(file)
        try:
            size, digest, remarks = _looked_at(file, _stamp(file))
        except PictureError as error:
            report.broken[name] = error.reason
            continue
        except OSError as error:
            report.broken[name] = error.strerror or str(error)
            continue
        caption = captions.texts.get(file)
        if caption is None:
            report.uncaptioned.append(name)
        report.remarks += [f"{name}: {remark}" for remark in remarks]
        report.pictures.append(Picture(file, size, caption, digest))
    unused = [file for file in tree.files if not is_picture(file) and file not in captions.files]
    report.remarks += _unused(unused, tree)
    return report


@lru_cache(maxsize=100_000)
def _looked_at(file: Path, stamp: tuple[int, ...]) -> tuple[Size, str, tuple[str, ...]]:
    """Size, SHA-256 and remarks of a picture; remembered, because data is checked before a job and by the job itself.

    Args:
        stamp: changes with the file.

    Raises:
        PictureError: it cannot be read as a picture.
    """
    content = file.read_bytes()
    reading = read(content, file.name)
    return reading.image.size, hashlib.sha256(content).hexdigest(), tuple(reading.remarks)


def _stamp(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _unused(files: Sequence[Path], tree: Tree) -> list[str]:
    """Remarks on files beside the pictures that are not read."""
    alone = [tree.name(file) for file in files if is_caption(file)]
    others = [tree.name(file) for file in files if not is_caption(file)]
    made = [f"{_some(alone)} belong to no picture"] if alone else []
    return [*made, f"{_some(others)} are not read"] if others else made


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{len(names)} files ({shown}{', ...' if len(names) > 5 else ''})"


def usable_pictures(folder: Path, *, skip_broken: bool = False, need_captions: bool = False) -> FolderReport:
    """:func:`scan`, with an error for what cannot be trained on.

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


def read_pixels(file: Path, placement: Placement, flip: bool) -> torch.Tensor:
    """Pixels ``(3, height, width)`` in [-1, 1] of a picture, resized, cut and (if ``flip``) mirrored."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    picture = open_picture(file)
    if picture.size != placement.resized:
        picture = picture.resize(placement.resized, Image.Resampling.LANCZOS)
    width, height = placement.size
    picture = picture.crop((placement.left, placement.top, placement.left + width, placement.top + height))
    if flip:
        picture = ImageOps.mirror(picture)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(127.5).sub(1.0)
