"""Sound from any file: one channel at 16 kHz, as Whisper hears it. Decoded by FFmpeg's libraries (PyAV)."""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from numpy.typing import NDArray

RATE = 16_000
"""Samples per second."""

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".webm", ".mp4", ".mkv", ".wma", ".aiff", ".amr")
"""Usual endings of files with sound; others are tried too when a person names them."""


@dataclass(frozen=True, eq=False)
class Sound:
    """One channel at 16 kHz.

    Attributes:
        samples: (n,) float32, full scale is 1.
        remarks: what was changed to make it so.
    """

    samples: NDArray[np.float32]
    remarks: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return len(self.samples) / RATE


def read(source: str | Path | bytes) -> Sound:
    """The sound of a file (or of a video), or of a file's content.

    Raises:
        InputError: no such file, nothing that FFmpeg can decode, no sound in it, or no samples.
        MissingDependencyError: PyAV is not installed.
    """
    av = _av()
    name = "the recording" if isinstance(source, bytes) else f"'{source}'"
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise InputError(f"There is no sound file {name}.")
    try:
        with (
            io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as opened,
            # a playlist may name other files and addresses: nothing but what was given is opened
            av.open(opened, options={"protocol_whitelist": "data"}) as container,
        ):
            if not container.streams.audio:
                raise InputError(f"{name} holds no sound.")
            stream = container.streams.audio[0]
            rate, channels = stream.rate, stream.channels
            resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
            frames = itertools.chain(container.decode(stream), [None])
            parts = [part.to_ndarray().ravel() for frame in frames for part in resampler.resample(frame)]
    except (av.FFmpegError, ValueError, OSError) as error:
        raise InputError(f"The sound of {name} cannot be read ({_reason(error)}).") from None
    remarks = [f"resampled from {rate:,} to {RATE:,} samples per second"] if rate != RATE else []
    remarks += [f"its {channels} channels became one"] if channels != 1 else []
    samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return checked(Sound(samples.astype(np.float32, copy=False), tuple(remarks)), name)


def of_array(samples: Any, rate: int) -> Sound:
    """Sound of an array (n,) or (n, channels) of floats, or of integers at their full scale.

    Raises:
        InputError: as :func:`read`, or an array of another shape.
        MissingDependencyError: it needs resampling, and PyAV is not installed.
    """
    given = np.asarray(samples)
    if given.ndim not in (1, 2):
        raise InputError(f"Sound is an array (n,) or (n, channels), not {given.shape}.")
    if np.issubdtype(given.dtype, np.integer):
        given = given.astype(np.float32) / float(np.iinfo(given.dtype).max)
    remarks = []
    if given.ndim == 2:
        remarks += [f"its {given.shape[1]} channels became one"] if given.shape[1] != 1 else []
        given = given.mean(1)
    found = checked(Sound(given.astype(np.float32)), "the recording")
    if rate != RATE:
        remarks.insert(0, f"resampled from {rate:,} to {RATE:,} samples per second")
        found = Sound(_resampled(found.samples, rate))
    return Sound(found.samples, tuple(remarks))


def checked(sound: Sound, name: str) -> Sound:
    """``sound``; raises :class:`InputError` if it is empty or holds numbers that are not finite."""
    if not len(sound.samples):
        raise InputError(f"{name[0].upper()}{name[1:]} is empty: there is no sound to hear.")
    if not np.isfinite(sound.samples).all():
        raise InputError(f"{name[0].upper()}{name[1:]} holds numbers that are not finite (NaN): record it again.")
    return sound


def _resampled(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    av = _av()
    frame: Any = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples)[None], format="flt", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
    return np.concatenate([part.to_ndarray().ravel() for one in (frame, None) for part in resampler.resample(one)])


def _reason(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise MissingDependencyError("av", "speech", "Reading sound") from None
    return av
