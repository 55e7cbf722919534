"""Pictures dropped on a page, for training or as a start: checked, shown small, then used."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters import files as written
from adapters.errors import InputError
from studio import settings
from studio.datasets import captions as caption_files
from studio.datasets.captions import ENDINGS as CAPTIONS
from studio.datasets.pictures import SUFFIXES, content_of, is_picture, read
from ui import markup

Item = dict[str, Any]
"""One picture on the page: id (its path below the uploads folder), name, url (of its thumbnail), size, caption."""

SIDE = 240
LARGE = 1024
"""Longest sides in pixels of the copies that a page shows: in a list, and to paint on."""


def uploads() -> Path:
    """Where the app keeps dropped files."""
    return settings.folder("uploads")


def receive(paths: Iterable[str | Path], present: Sequence[Item] = ()) -> tuple[list[Item], list[str]]:
    """Items for dropped files, and a sentence for every file that is not used, or not used as it is.

    A caption file belongs to the picture of the same name dropped with it, else to the only present picture of that
    name.
    """
    files = [Path(path) for path in paths]
    fresh, problems = _items([file for file in files if not caption_files.is_caption(file)])
    items = [dict(item) for item in present]
    known = {item["id"] for item in items}
    fresh = [item for item in fresh if item["id"] not in known]
    for file in sorted((f for f in files if caption_files.is_caption(f)), key=_rank):
        try:
            text = caption_files.one_line(caption_files.read_text(file))
        except InputError as error:
            problems.append(str(error))
            continue
        owners = [item for group in (fresh, items) if (item := _owner(file, group, problems)) is not None][:1]
        if not owners:
            problems.append(f"'{file.name}' belongs to none of the pictures.")
        for item in owners:
            item["caption"] = text
    return [*items, *fresh], list(dict.fromkeys(problems))


def _rank(file: Path) -> int:
    """Sorts caption files by rising precedence: later ones replace earlier ones."""
    return -caption_files.ENDINGS.index(file.suffix.lower())


def _owner(file: Path, items: Sequence[Item], problems: list[str]) -> Item | None:
    """The one picture that a caption file is for: of the same full name, else of the same stem."""
    for same in (lambda name: name, lambda name: Path(name).stem):
        owners = [item for item in items if same(item["name"]) == file.stem]
        if len(owners) == 1:
            return owners[0]
        if owners:
            problems.append(f"'{file.name}' could belong to {len(owners)} pictures: write their captions by hand.")
            return None
    return None


def _items(files: Sequence[Path]) -> tuple[list[Item], list[str]]:
    items, problems = [], []
    for file in files:
        try:
            item, remarks = _item(file)
        except InputError as error:
            problems.append(str(error))
            continue
        items.append(item)
        problems += [f"'{file.name}': {remark}." for remark in remarks]
    return items, problems


def keep(items: Sequence[Mapping[str, Any]], name: str) -> Path:
    """Copy the pictures with their captions into a folder in the studio's home and return it.

    Raises:
        InputError: there are no pictures, or one was not uploaded.
    """
    if not items:
        raise InputError("There are no pictures yet: drop at least one, five to twenty work well.")
    stem = re.sub(r"[^\w-]+", "-", name).strip("-") or "pictures"
    folder = settings.folder("datasets", f"{stem}-{time.strftime('%y%m%d-%H%M%S')}-{time.time_ns() % 4096:03x}")
    for number, item in enumerate(items, 1):
        source = uploaded(str(item.get("id", "")))
        target = folder / f"{number:03d}-{source.name}"
        shutil.copyfile(source, target)
        caption = str(item.get("caption") or "").strip()
        if caption:
            settings.write_text(target.with_suffix(".txt"), caption + "\n")
    return folder


def forget(folder: Path) -> None:
    """Remove what :func:`keep` made for a job that came to nothing."""
    if folder.parent == settings.folder("datasets"):
        shutil.rmtree(folder, ignore_errors=True)


def uploaded(item_id: str) -> Path:
    """The uploaded file with this id; raises :class:`InputError` for anything outside the uploads folder."""
    root = uploads().resolve()
    path = (root / item_id).resolve()
    if not path.is_relative_to(root) or not path.is_file() or not is_picture(path):
        raise InputError("A picture is missing: upload it again.")
    return path


def still_here(items: Sequence[Mapping[str, Any]] | None) -> list[Item]:
    """The pictures whose uploaded file still exists."""
    kept = []
    for item in items or ():
        try:
            uploaded(str(item.get("id", "")))
        except InputError:
            continue
        kept.append(dict(item))
    return kept


def started(file: Path) -> tuple[Item, tuple[str, ...]]:
    """A dropped picture to start from, with a copy to paint on, and sentences on what of it was not kept.

    Raises:
        InputError: it was not uploaded here, or cannot be read.
    """
    return _item(file, LARGE)


def taken(name: str, source: str | Path) -> Path:
    """A copy of a picture (a file or a ``data:`` URI) among the uploads, which the page may use."""
    content = content_of(source)
    target = settings.folder("uploads", "starts", hashlib.sha256(content).hexdigest()[:20]) / name
    return written.write(target, lambda part: part.write_bytes(content), sync=False)


def _item(file: Path, side: int = SIDE) -> tuple[Item, tuple[str, ...]]:
    root = uploads().resolve()
    place = file.resolve()
    if not place.is_relative_to(root):
        raise InputError(f"'{file.name}' was not uploaded here.")
    if not is_picture(file):
        raise InputError(f"'{file.name}' is neither a picture nor a caption.")
    thumbnail, (width, height), remarks = _thumbnail(place, side)
    return {
        "id": place.relative_to(root).as_posix(), "name": file.name, "url": markup.file_url(thumbnail),
        "size": f"{width} × {height}", "pixels": [width, height], "caption": "",
    }, remarks  # fmt: skip


def _thumbnail(file: Path, side: int) -> tuple[Path, tuple[int, int], tuple[str, ...]]:
    """A small copy, the picture's size in pixels, and sentences on what of it was not kept."""
    reading = read(file)
    target = _small(file, side)
    _shrink(reading.image, target, side)
    return target, reading.image.size, reading.remarks


def thumbnail(file: Path) -> Path:
    """A small copy of a picture that the studio made, written once."""
    from PIL import Image

    target = _small(file, SIDE)
    if not target.is_file():
        with Image.open(file) as picture:
            _shrink(picture.convert("RGB"), target, SIDE)
    return target


def _small(file: Path, side: int) -> Path:
    """Path of a file's small copy; a new one once the file has changed."""
    key = hashlib.sha256(f"{file} {file.stat().st_mtime_ns} {side}".encode()).hexdigest()[:20]
    return settings.folder("uploads", "thumbnails") / f"{key}.webp"


def _shrink(picture: Any, target: Path, side: int) -> None:
    small = picture.copy()
    small.thumbnail((side, side))
    written.write(target, lambda part: small.save(part, "WEBP", quality=85), sync=False)


__all__ = ["CAPTIONS", "SUFFIXES", "Item", "keep", "receive", "started", "taken", "thumbnail", "uploaded", "uploads"]
