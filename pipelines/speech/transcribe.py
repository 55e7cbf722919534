"""Writing down speech of any length, with times.

With times, transformers' own long-form decoding is used: windows end where the last complete segment ends, and a window
is tried again at a higher temperature when its text loops or is improbable. Without times, as an adapter is trained,
the sound is cut at quiet moments into pieces that fit one window, which then are the segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adapters.errors import InputError
from adapters.progress import Monitor, Progress, Silent, check
from pipelines.speech.audio import RATE, Sound
from pipelines.speech.loading import SpeechModel
from pipelines.speech.transcript import Segment, Transcript

if TYPE_CHECKING:
    from numpy.typing import NDArray

FALLBACK = {
    "temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), "compression_ratio_threshold": 1.35, "logprob_threshold": -1.0,
    "no_speech_threshold": 0.6, "condition_on_prev_tokens": False,
}  # fmt: skip
"""When a window is decoded again; the ratio is of tokens, as transformers counts."""

MOST_PER_SECOND, LEAST_TOKENS = 10, 24
"""A transcript without times has at most this many tokens per second of sound (speech has about four), and at least
this many, so that a loop does not fill the context."""

QUIET_SHARE = 0.3
"""A piece ends at the quietest moment of this last share of the window."""


def transcribe(
    base: SpeechModel,
    model: Any,
    sound: Sound,
    language: str = "",
    task: str = "transcribe",
    times: bool = True,
    monitor: Monitor | None = None,
) -> Transcript:
    """What is said in ``sound``.

    Args:
        model: the base's model, with or without adapters.
        language: code or name; empty = recognised (English for an English-only model).
        task: "transcribe", or "translate" into English.
        times: let the model tell times; without them, times are those of the pieces.
        monitor: told after each window; may cancel.

    Raises:
        InputError: a language or task the model does not know.
        Cancelled: ``monitor`` asked to stop.
    """
    base.check_language(language, task)
    monitor = monitor or Silent()
    asked: dict[str, Any] = {}
    if base.multilingual:
        asked = {"task": task, **({"language": base.language_name(language).strip("<|>")} if language else {})}
    heard = (_timed if times else _pieces)(base, model, sound, asked, monitor)
    return Transcript(tuple(heard), sound.seconds, language if base.multilingual else "")


@torch.no_grad()
def _timed(
    base: SpeechModel, model: Any, sound: Sound, asked: dict[str, Any], monitor: Monitor
) -> Iterator[Segment]:
    """Segments with the model's own times."""
    long = sound.seconds > base.window
    features = features_of(base, [sound.samples], whole=long)

    def follow(progress: torch.Tensor) -> None:
        check(monitor)
        done, total = (int(value) for value in progress[0])
        monitor.report(Progress("transcribing", min(done, total), total, message=f"{done / 100:.0f} s heard"))

    more = {**FALLBACK, "attention_mask": features["attention_mask"], "monitor_progress": follow} if long else {}
    found = model.generate(
        features["input_features"], return_timestamps=True, return_segments=True, **asked, **more
    )  # fmt: skip
    for one in found["segments"][0]:
        text = base.tokenizer.decode(one["tokens"], skip_special_tokens=True)
        if text.strip():
            start, end = float(one["start"]), min(float(one["end"]), sound.seconds)
            yield Segment(min(start, end), end, text)


def _pieces(
    base: SpeechModel, model: Any, sound: Sound, asked: dict[str, Any], monitor: Monitor
) -> Iterator[Segment]:
    """One segment per window, without the model's times."""
    cuts = pieces(sound.samples, base.window)
    for number, (start, end) in enumerate(cuts, 1):
        check(monitor)
        text = said(base, model, [sound.samples[start:end]], asked)[0]
        monitor.report(Progress("transcribing", number, len(cuts), message=f"{end / RATE:.0f} s heard"))
        if text.strip():
            yield Segment(start / RATE, end / RATE, text)


@torch.no_grad()
def said(
    base: SpeechModel, model: Any, sounds: list[NDArray[np.float32]], asked: dict[str, Any] | None = None
) -> list[str]:
    """The greedy texts of sounds that each fit one window, without times."""
    longest = max(len(samples) for samples in sounds) / RATE
    if longest > base.window:
        raise InputError(f"{longest:.1f} s do not fit the window of {base.window:g} s: cut the sound into pieces.")
    features = features_of(base, sounds)
    most = max(LEAST_TOKENS, int(MOST_PER_SECOND * longest))
    found = model.generate(
        features["input_features"], return_timestamps=False, max_new_tokens=min(most, base.longest - 4), **(asked or {})
    )  # fmt: skip
    return [str(text).strip() for text in base.tokenizer.batch_decode(found, skip_special_tokens=True)]


def features_of(base: SpeechModel, sounds: list[NDArray[np.float32]], whole: bool = False) -> dict[str, torch.Tensor]:
    """Log-mel features (batch, bins, frames) in the model's precision: of one window, or of the ``whole`` sound."""
    options = {"truncation": False, "padding": "longest", "return_attention_mask": True} if whole else {}
    made = base.processor.feature_extractor(sounds, sampling_rate=RATE, return_tensors="pt", **options)
    like = next(p for p in base.model.parameters() if p.is_floating_point())
    given = {"input_features": made["input_features"].to(like.device, like.dtype)}
    if whole:
        given["attention_mask"] = made["attention_mask"].to(like.device)
    return given


def pieces(samples: NDArray[np.float32], window: float) -> list[tuple[int, int]]:
    """(start, end) of pieces of at most ``window`` seconds, cut at quiet moments."""
    most, found, start = int(window * RATE), [], 0
    while len(samples) - start > most:
        first = start + int(most * (1 - QUIET_SHARE))
        end = first + _quietest(samples[first : start + most])
        found.append((start, end))
        start = end
    return [*found, (start, len(samples))]


def _quietest(samples: NDArray[np.float32], width: int = RATE // 10) -> int:
    """Middle of the quietest tenth of a second."""
    power = np.cumsum(np.concatenate([[0.0], samples.astype(np.float64) ** 2]))
    sums = power[width:] - power[:-width]
    return int(sums.argmin()) + width // 2 if len(sums) else len(samples)
