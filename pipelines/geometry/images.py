"""Photos prepared for the network, and the map back to the pixels of the file."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adapters.errors import InputError
from pipelines import pictures


@dataclass(frozen=True)
class Affine:
    """Network pixel = file pixel * scale - crop, per axis (x, y); ``size`` is the file's (width, height)."""

    scale: tuple[float, float] = (1.0, 1.0)
    crop: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)

    def intrinsics(self, focal: float, height: int, width: int) -> tuple[float, float, float, float]:
        """fx, fy, cx, cy in the file's pixels (pixel centres at integers) of a camera in the network's."""
        (sx, sy), (x, y) = self.scale, self.crop
        # Pixel centres map as (i + 1/2) * scale = j + crop + 1/2.
        return focal / sx, focal / sy, (width / 2 + x + 0.5) / sx - 0.5, (height / 2 + y + 0.5) / sy - 0.5


@dataclass(frozen=True)
class Photo:
    """One picture.

    Attributes:
        pixels: ``(3, H, W)`` in [0, 1].
        affine: map from the pixels of the upright file.
        name: of the file.
        sha256: of the file's bytes.
        file: its path, for exports that include the pictures.
        remarks: what of the file was not kept, and how a video's frames were chosen.
    """

    pixels: Tensor
    affine: Affine
    name: str
    sha256: str = ""
    file: Path | None = None
    remarks: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def facts(self) -> dict[str, Any]:
        """The facts recorded in ``scene.json``."""
        return {"name": self.name, "sha256": self.sha256, "height": self.size[0], "width": self.size[1],
                "affine": asdict(self.affine)}  # fmt: skip


def read_photo(path: str | Path, size: int = 512, patch: int = 16, square_ok: bool = False) -> Photo:
    """Read a picture file and :func:`prepare` it.

    Raises:
        InputError: it cannot be read as a picture, or is too small or narrow.
    """
    file = Path(path)
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise InputError(f"There is no picture '{file}'.") from None
    except OSError as error:
        raise InputError(f"The picture '{file}' cannot be read: {error.strerror}.") from None
    reading = pictures.read(data, file.name)
    photo = prepare(reading.image, file.name, hashlib.sha256(data).hexdigest(), size, patch, square_ok)
    return replace(photo, file=file, remarks=tuple(f"{file.name}: {text}." for text in reading.remarks))


def prepare(
    picture: Image.Image, name: str, sha256: str = "", size: int = 512, patch: int = 16, square_ok: bool = False
) -> Photo:
    """Resize and crop as the networks were trained.

    With ``size`` 224 the short side becomes 224 and the central square is cropped. Otherwise the long side becomes
    ``size`` and the centre is cropped to sides that are multiples of ``patch``; a square is cropped to 4:3 unless
    ``square_ok``. Portraits stay portraits.

    Raises:
        InputError: the picture is so small or narrow that no patch would be left.
    """
    width, height = picture.size
    if size == 224:
        long = round(224 * max(width / height, height / width))
        new = (long, 224) if width > height else (224, long)
    else:
        ratio = size / max(width, height)
        new = (round(width * ratio), round(height * ratio))
    if min(new) < 1:
        raise InputError(f"'{name}' is too narrow: {width} x {height} pixels.")
    shrinks = max(new) < max(width, height)
    resized = picture.resize(new, Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC)
    cx, cy = new[0] // 2, new[1] // 2
    half_w: float
    half_h: float
    if size == 224:
        half_w = half_h = min(cx, cy)
    else:
        half_w, half_h = (2 * c // patch * patch / 2 for c in (cx, cy))
        if not square_ok and half_w == half_h:
            half_h = 3 * half_w / 4 // (patch / 2) * (patch / 2)
    if min(half_w, half_h) * 2 < patch:
        raise InputError(f"'{name}' is too narrow: {width} x {height} pixels leave less than a patch of {patch}.")
    box = (int(cx - half_w), int(cy - half_h), int(cx + half_w), int(cy + half_h))
    array = np.asarray(resized.crop(box), dtype=np.float32) / 255
    affine = Affine((new[0] / width, new[1] / height), (box[0], box[1]), (width, height))
    return Photo(torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous(), affine, name, sha256)
