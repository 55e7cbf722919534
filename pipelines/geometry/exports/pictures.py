"""The pictures exported with camera files, and the cameras' intrinsics for exactly their pixels.

Other programs read a picture as it is stored: they ignore EXIF orientation and do not support every format. So each
picture is exported upright, as JPEG or PNG, under a name without spaces: the original's bytes if they already qualify,
else a converted copy. If the original is not available, the scene's own picture in the network's size is used.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from adapters.errors import InputError
from pipelines import pictures
from pipelines.geometry.images import Affine
from pipelines.geometry.scene import Scene

_EXIF_TURN = 0x112
_PLAIN = {"JPEG": ("RGB", "L"), "MPO": ("RGB", "L"), "PNG": ("RGB", "L", "RGBA")}
"""File formats and pixel modes that every program reads."""


@dataclass(frozen=True)
class View:
    """An exported picture, and its pinhole camera in pixels with centres at half-integers."""

    name: str
    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float


def write_pictures(scene: Scene, folder: Path, originals: Sequence[Path | None] = ()) -> tuple[list[View], list[str]]:
    """Write every picture of a scene into ``folder``.

    Args:
        originals: the pictures' files in the scene's order; None where unknown.

    Returns:
        The views, and notes on what was renamed, converted or not found.

    Raises:
        InputError: the scene has a single picture, which has no pose.
    """
    if len(scene.names) < 2:
        raise InputError("Camera files need two pictures or more, since one has no pose: choose glb, ply or npz.")
    folder.mkdir(parents=True, exist_ok=True)
    files = originals if len(originals) == len(scene.names) else [None] * len(scene.names)
    views, turned, own, renamed, taken = [], [], [], [], set[str]()
    for n, (name, file) in enumerate(zip(scene.names, files, strict=True)):
        stem = _free(word(Path(name).stem), taken)
        found = _original(file, scene.affines[n].size) if file is not None else None
        if found is None:
            written, affine = f"{stem}.png", Affine()
            Image.fromarray(scene.images[n]).save(folder / written)
            own.append(name)
        else:
            assert file is not None
            written, affine = stem + found.suffix, scene.affines[n]
            if found.copied:
                shutil.copyfile(file, folder / written)
            else:
                # PNG ignores JPEG's options
                pictures.open_picture(file).save(folder / written, quality=95, subsampling=0)
                turned.append(name)
        if written != name:
            renamed.append(f"'{name}' as {written}")
        height, width = scene.depth[n].shape
        fx, fy, cx, cy = affine.intrinsics(float(scene.focals[n]), height, width)
        if affine.size != (0, 0):
            width, height = affine.size
        views.append(View(written, width, height, fx, fy, cx + 0.5, cy + 0.5))
    return views, _notes(turned, own, renamed, len(scene.names))


def word(name: str) -> str:
    """A name with "_" for spaces, control characters and slashes."""
    return "".join("_" if c.isspace() or not c.isprintable() or c in "/\\" else c for c in name) or "_"


@dataclass(frozen=True)
class _Original:
    suffix: str
    copied: bool


def _original(file: Path, size: tuple[int, int]) -> _Original | None:
    """How a file is exported; None if it is missing or no longer the picture of this size."""
    try:
        with Image.open(file, formats=["JPEG", "PNG"]) as opened:
            turn = opened.getexif().get(_EXIF_TURN, 1)
            plain = opened.mode in _PLAIN.get(opened.format or "", ())
            if turn == 1 and plain and opened.size == size:
                return _Original(file.suffix.lower(), True)
            lossy = opened.format != "PNG"
    except (OSError, ValueError, SyntaxError):
        lossy = False
    try:
        upright = pictures.open_picture(file)
    except InputError:
        return None
    return _Original(".jpg" if lossy else ".png", False) if upright.size == size else None


def _free(stem: str, taken: set[str]) -> str:
    """The name, with a number if another picture has it."""
    free = next(name for name in (stem, *(f"{stem}-{n}" for n in range(2, len(taken) + 3))) if name not in taken)
    taken.add(free)
    return free


def _notes(turned: list[str], own: list[str], renamed: list[str], count: int) -> list[str]:
    notes = []
    if turned:
        notes.append(f"images/ contains upright 8-bit copies of {_some(turned)}.")
    if own:
        which = "the pictures" if len(own) == count else _some(own)
        notes.append(
            f"The original files of {which} are missing or have changed: images/ contains them in the network's size."
        )
    if renamed:
        notes.append(f"Pictures in images/ are renamed for this format: {_some(renamed)}.")
    return notes


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
