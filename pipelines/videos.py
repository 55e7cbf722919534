"""The one writer of videos: MP4 files that browsers and players show.

PyAV (``av``, the extra ``video``) writes H.264, with sound if there is any; without it OpenCV writes VP9, and no sound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import files
from adapters.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True)
class Sound:
    """The sound of a video: ``samples`` (channels, length) between -1 and 1, ``rate`` of them per second."""

    samples: Tensor
    rate: int


def write(frames: Sequence[Image.Image], path: Path, rate: float, sound: Sound | None = None) -> bool:
    """Write ``frames`` to the MP4 file ``path``; returns whether it has the ``sound``.

    Args:
        frames: pictures of one size.
        rate: frames per second.

    Raises:
        InputError: no frames, or the file cannot be written.
        MissingDependencyError: there is no encoder.
    """
    if not frames:
        raise InputError("A video needs at least one frame.")
    check_encoder()
    if _has("av"):
        files.write(path, lambda part: _with_av(frames, part, rate, sound), sync=False)
        return sound is not None
    files.write(path, lambda part: _with_opencv(frames, part, rate), sync=False)
    return False


def check_encoder() -> None:
    """Raise :class:`MissingDependencyError` if there is no encoder."""
    if not _has("av") and not _has("cv2"):
        raise MissingDependencyError("av", "video", "Writing a video")


def count(path: Path) -> int:
    """How many frames of a video file can be read.

    Raises:
        MissingDependencyError: there is no decoder.
    """
    if not _has("cv2"):
        raise MissingDependencyError("opencv-python-headless", "video", "Reading a video")
    import cv2

    video = cv2.VideoCapture(str(path))
    found = 0
    while video.grab():
        found += 1
    video.release()
    return found


def _has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def _with_opencv(frames: Sequence[Image.Image], path: Path, rate: float) -> None:
    import cv2
    import numpy as np

    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"vp09"), float(rate), frames[0].size)  # type: ignore[attr-defined]
    if not video.isOpened():
        raise MissingDependencyError("av", "video", "Writing a video (this OpenCV has no encoder for VP9)")
    for frame in frames:
        video.write(cv2.cvtColor(np.asarray(frame.convert("RGB")), cv2.COLOR_RGB2BGR))
    video.release()
    if not path.is_file() or not path.stat().st_size:  # OpenCV does not say why
        raise InputError(f"The video '{path.name}' could not be written: is there room on the disk?")


def _with_av(frames: Sequence[Image.Image], path: Path, rate: float, sound: Sound | None) -> None:
    from fractions import Fraction

    import av

    with av.open(str(path), "w", format="mp4") as made:
        video: Any = made.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000))
        video.width, video.height = (side // 2 * 2 for side in frames[0].size)  # its colours need even sides
        video.pix_fmt = "yuv420p"
        audio: Any = made.add_stream("aac", rate=sound.rate) if sound else None
        if audio is not None:
            audio.layout = "stereo"
        from_image: Any = av.VideoFrame.from_image  # typed or not, by the version
        for frame in frames:
            for packet in video.encode(from_image(frame.convert("RGB"))):
                made.mux(packet)
        made.mux(list(video.encode()))
        if sound is not None:
            block: Any = av.AudioFrame.from_ndarray(_stereo(sound), format="fltp", layout="stereo")
            block.sample_rate = sound.rate
            made.mux([*audio.encode(block), *audio.encode()])


def _stereo(sound: Sound) -> Any:
    """The samples as (2, length) in fp32."""
    samples = sound.samples.detach().float().cpu()
    return samples.expand(2, -1).contiguous().numpy() if samples.shape[0] == 1 else samples[:2].contiguous().numpy()
