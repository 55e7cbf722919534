"""Frames of a video: evenly spaced over its whole length, each the sharpest one near its position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adapters.errors import InputError

SUFFIXES = (".mp4", ".mov", ".webm", ".avi", ".mkv", ".m4v")
MOST = 60
"""Most frames taken."""
NEAR = 0.25
"""How far a frame may be from its position, as a share of the distance between two positions."""


@dataclass(frozen=True)
class Frames:
    """Frames chosen from a video.

    Attributes:
        images: RGB, upright.
        times: in seconds from the start.
        length: of the video, in seconds.
        asked: the requested time between frames, in seconds.
    """

    images: tuple[Image.Image, ...]
    times: tuple[float, ...]
    length: float
    asked: float

    def __str__(self) -> str:
        count = len(self.images)
        text = f"{count} frame{'s' if count > 1 else ''} of the video's {self.length:.1f} seconds"
        if count > 1:
            text += f", one about every {(self.times[-1] - self.times[0]) / (count - 1):.1f} seconds"
        wanted = int(self.length / self.asked) + 1
        if wanted > count:
            text += f" (one every {self.asked:g} seconds would be {wanted}; the limit is {MOST})"
        return text + "; each is the sharpest near its position."


def read_video(path: str | Path, seconds: float, most: int = MOST) -> Frames:
    """A frame about every ``seconds`` of the whole video, or further apart if that would be more than ``most``.

    The video is read three times: to count its frames, to compare the sharpness near each position, and to keep the
    chosen frames.

    Raises:
        InputError: the file is not a video, contains no frame, or ``seconds`` is not positive.
    """
    if seconds <= 0:
        raise InputError("The time between frames must be more than 0 seconds.")
    file = Path(path)
    count, rate = _length(file)
    if not count:
        raise InputError(f"'{file.name}' contains no frames that can be read: give a video file or pictures.")
    chosen = _sharpest(file, places(count, rate, seconds, most), count)
    found = dict(_read(file, set(chosen)))
    return Frames(tuple(map(_picture, found.values())), tuple(n / rate for n in found), count / rate, seconds)


def places(count: int, rate: float, seconds: float, most: int) -> list[int]:
    """Numbers of evenly spaced frames from the first on: one every ``seconds``, at most ``most``."""
    wanted = min(int((count - 1) / (rate * seconds)) + 1, most)
    if wanted < 2:
        return [0]
    step = max(rate * seconds, (count - 1) / (wanted - 1)) if wanted == most else rate * seconds
    return sorted({min(round(n * step), count - 1) for n in range(wanted)})


def sharpness(frame: Any) -> float:
    """Variance of the Laplacian of the grey frame (BGR); blur lowers it."""
    import cv2

    grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


def _length(file: Path) -> tuple[int, float]:
    """Number of readable frames, and frames per second. They are counted because the header is often wrong."""
    import cv2

    stream = cv2.VideoCapture(str(file))
    rate = stream.get(cv2.CAP_PROP_FPS)
    count = 0
    while stream.grab():
        count += 1
    stream.release()
    return count, rate if np.isfinite(rate) and rate > 0 else 25.0


def _sharpest(file: Path, wanted: list[int], count: int) -> list[int]:
    """For each position the sharpest frame near it; among equals the nearest."""
    if len(wanted) < 2:
        return wanted
    reach = int(NEAR * (wanted[1] - wanted[0]))
    near = {n: place for place in wanted for n in range(max(0, place - reach), min(count, place + reach + 1))}
    best: dict[int, tuple[float, int, int]] = {}
    for n, frame in _read(file, set(near)):
        score = (sharpness(frame), -abs(n - near[n]), n)
        best[near[n]] = max(best.get(near[n], score), score)
    return [best[place][2] if place in best else place for place in wanted]


def _read(file: Path, wanted: set[int]) -> Iterator[tuple[int, Any]]:
    """Numbers and pixels of some frames, in order."""
    import cv2

    stream = cv2.VideoCapture(str(file))
    last = max(wanted)
    for n in range(last + 1):
        if not stream.grab():
            break
        if n in wanted:
            good, frame = stream.retrieve()
            if good:
                yield n, frame
    stream.release()


def _picture(frame: Any) -> Image.Image:
    import cv2

    return Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
