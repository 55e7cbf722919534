"""Training pictures that were dropped on the page: checked, shown small, then kept as a data set."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from adapters.errors import InputError
from studio import settings
from ui import markup

Item = dict[str, Any]
"""One picture on the page: id (its path below the uploads folder), name, url (of its thumbnail), size, caption."""

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SIDE = 240


def uploads() -> Path:
    """Where the app keeps what was dropped on it."""
    return settings.folder("uploads")


def receive(paths: Iterable[str | Path], present: Sequence[Item] = ()) -> tuple[list[Item], list[str]]:
    """Items for dropped files (pictures, and captions as same-named ``.txt``), and a sentence per unusable file."""
    files = [Path(path) for path in paths]
    captions = {file.stem: file.read_text(encoding="utf-8", errors="replace").strip()
                for file in files if file.suffix.lower() == ".txt"}  # fmt: skip
    items = [{**item, "caption": captions.get(Path(item["name"]).stem, item["caption"])} for item in present]
    known = {item["id"] for item in items}
    problems: list[str] = []
    for file in files:
        if file.suffix.lower() == ".txt":
            continue
        try:
            item = _item(file, captions.get(file.stem, ""))
        except InputError as error:
            problems.append(str(error))
            continue
        if item["id"] not in known:
            items.append(item)
    return items, problems


def keep(items: Sequence[Mapping[str, Any]], name: str) -> Path:
    """Copy the pictures with their captions into a folder of the studio and return it.

    Raises:
        InputError: there are no pictures, or one is not among those that were dropped.
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


def uploaded(item_id: str) -> Path:
    """The dropped file with this id; raises :class:`InputError` for anything outside the uploads folder."""
    root = uploads().resolve()
    path = (root / item_id).resolve()
    if not path.is_relative_to(root) or not path.is_file() or path.suffix.lower() not in ENDINGS:
        raise InputError("A picture is no longer there: drop it again.")
    return path


def _item(file: Path, caption: str) -> Item:
    root = uploads().resolve()
    place = file.resolve()
    if not place.is_relative_to(root):
        raise InputError(f"'{file.name}' was not uploaded here.")
    thumbnail, (width, height) = _thumbnail(place)
    return {
        "id": place.relative_to(root).as_posix(), "name": file.name, "url": markup.file_url(thumbnail),
        "size": f"{width} × {height}", "caption": caption,
    }  # fmt: skip


def _thumbnail(file: Path) -> tuple[Path, tuple[int, int]]:
    if file.suffix.lower() not in ENDINGS:
        raise InputError(f"'{file.name}' is no picture the studio reads ({', '.join(ENDINGS)}).")
    if not file.stat().st_size:
        raise InputError(f"'{file.name}' is empty.")
    key = hashlib.sha256(f"{file} {file.stat().st_mtime_ns}".encode()).hexdigest()[:20]
    target = settings.folder("uploads", "thumbnails") / f"{key}.webp"
    try:
        with Image.open(file) as image:
            size = image.size
            image.draft("RGB", (SIDE, SIDE))
            small = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise InputError(f"'{file.name}' cannot be read as a picture.") from None
    small.thumbnail((SIDE, SIDE))
    small.save(target, "WEBP", quality=85)
    return target, size
