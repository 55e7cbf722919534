"""A loaded speech model with the adapters used so far."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from adapters.progress import Monitor, Progress, Silent
from pipelines.speech.adapters import AdaptedSpeech
from pipelines.speech.audio import Sound
from pipelines.speech.loading import SpeechModel, open_model
from pipelines.speech.scores import Score, score
from pipelines.speech.transcribe import transcribe
from pipelines.speech.transcript import Transcript
from studio import devices, library, silence
from studio.conversation import Variant, parse_adapter, variants_of
from studio.transcription.schema import TranscribeConfig


class Listener:
    """Keeps the last base and its adapters loaded."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._base: SpeechModel | None = None
        self._adapted: AdaptedSpeech | None = None
        self._paths: dict[str, Path] = {}

    def hear(self, sound: Sound, config: TranscribeConfig, monitor: Monitor | None = None) -> list[dict[str, Any]]:
        """What every variant makes of ``sound``: ``variant``, ``adapters``, ``transcript``, ``score`` (None without a
        reference) and ``seconds`` each.

        Raises:
            InputError: base, adapters or language cannot be used.
            Cancelled: ``monitor`` asked to stop.
        """
        monitor = monitor or Silent()
        variants = variants_of([parse_adapter(text) for text in config.adapters], config.compare)
        self._load(config, variants, monitor)
        return [self._heard(sound, config, variant, monitor) for variant in variants]

    def _load(self, config: TranscribeConfig, variants: tuple[Variant, ...], monitor: Monitor) -> None:
        key = (config.base, config.device, config.dtype, config.quantization, config.window)
        if self._key != key:
            monitor.report(Progress("loading", message=f"Loading {config.base}"))
            self._key, self._paths = None, {}
            self._base = open_model(
                library.resolve_speech(config.base), dtype=config.dtype, device=devices.resolve(config.device),
                quantization=config.quantization, window=config.window,
            )  # fmt: skip
            self._adapted = AdaptedSpeech(self._base, config.base)
            self._key = key
        assert self._adapted is not None
        for name in dict.fromkeys(name for variant in variants for name, _ in variant.adapters):
            if name not in self._paths:
                path = library.resolve_adapter(name)
                self._adapted.add(str(path), path)
                self._paths[name] = path

    def _heard(self, sound: Sound, config: TranscribeConfig, variant: Variant, monitor: Monitor) -> dict[str, Any]:
        assert self._adapted is not None
        assert self._base is not None
        begun = time.monotonic()
        monitor.report(Progress("transcribing", message=f"Listening with {variant.name}"))
        weights: dict[str, float] = {}
        for name, weight in variant.adapters:
            weights[str(self._paths[name])] = weights.get(str(self._paths[name]), 0.0) + weight
        with self._adapted.active(weights) as model, torch.random.fork_rng():
            torch.manual_seed(0)  # windows that are tried again are sampled
            found = transcribe(self._base, model, sound, config.language, config.task, config.times, monitor)
        return {
            "variant": variant.name, "adapters": [list(pair) for pair in variant.adapters], "transcript": found,
            "score": self._score(found, config), "seconds": round(time.monotonic() - begun, 3),
        }  # fmt: skip

    def _score(self, found: Transcript, config: TranscribeConfig) -> Score | None:
        if not config.reference.strip():
            return None
        assert self._base is not None
        return score([config.reference], [found.text], config.language or "en", self._base.tokenizer)


_listener: Listener | None = None


def listener() -> Listener:
    """This process's listener, whose model stays loaded for the next sound."""
    global _listener
    silence.loading_bars()
    if _listener is None:
        _listener = Listener()
    return _listener
