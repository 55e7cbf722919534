"""The pictures that lie beside files of cameras, and the cameras' numbers for exactly their pixels.

Other programs read a picture as it is stored: they do not turn it as EXIF says and do not know every kind of file. So
each picture is brought along, upright, as JPEG or PNG, under a name without spaces: the original's bytes where they are
that already, else a copy. Where the original is not at hand it is the scene's own picture in the network's size.
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
"""Kinds of files and pixels that every program reads."""


@dataclass(frozen=True)
class View:
    """A picture that was written, and its pinhole camera in its pixels, whose centres lie at halves."""

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
        originals: the pictures' files in the scene's order, where they are known.

    Returns:
        The views, and sentences on what was renamed, turned or not found.

    Raises:
        InputError: the scene has a single picture, whose camera says nothing.
    """
    if len(scene.names) < 2:
        raise InputError(
            "A file of cameras needs two pictures or more: one picture has no pose. Choose glb, ply or npz."
        )
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
                # PNG ignores what is said for JPEG
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
    """A name without what separates words or cannot be written: spaces, control characters, slashes."""
    return "".join("_" if c.isspace() or not c.isprintable() or c in "/\\" else c for c in name) or "_"


@dataclass(frozen=True)
class _Original:
    suffix: str
    copied: bool


def _original(file: Path, size: tuple[int, int]) -> _Original | None:
    """How a file is brought along; None where it is gone or no longer the picture of this size."""
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
    said = []
    if turned:
        said.append(f"images/ holds upright copies in colours of 8 bits of {_some(turned)}.")
    if own:
        which = "the pictures" if len(own) == count else _some(own)
        said.append(
            f"The original files of {which} are not at hand (or have changed): images/ holds them in the size that "
            "the network saw."
        )
    if renamed:
        said.append(f"Pictures in images/ have names that this format can hold: {_some(renamed)}.")
    return said


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
