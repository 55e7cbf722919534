"""Starting points: sets of values for the three kinds of training, at two lengths.

A preset fills fields of :class:`~studio.training.schemas.image.TrainImageConfig`; what the person gives wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.errors import InputError, nearest

_CONCEPT = {
    "mode": "concept",
    "rank": 8,
    "targets": "attention",
    "learning_rate": 2e-4,
    "snr_gamma": 5.0,
    "ema": True,
    "ema_decay": 0.99,
}
_STYLE = {
    "mode": "style",
    "rank": 16,
    "targets": "attention-mlp",
    "learning_rate": 1e-4,
    "snr_gamma": 5.0,
    "noise_offset": 0.03,
    "caption_dropout": 0.05,
    "ema": True,
    "ema_decay": 0.99,
}
_CAPTIONED = {
    "mode": "captioned",
    "rank": 16,
    "targets": "attention-mlp",
    "learning_rate": 1e-4,
    "snr_gamma": 5.0,
    "caption_dropout": 0.1,
    "ema": True,
}
_QUICK = {"steps": 150, "batch_size": 2, "checkpoint_every": 100}
_NORMAL = {"steps": 800, "batch_size": 4, "warmup_steps": 20, "checkpoint_every": 200}

PRESETS: dict[str, dict[str, Any]] = {
    f"{kind}-{length}": {**values, **size}
    for kind, values in (("concept", _CONCEPT), ("style", _STYLE), ("captioned", _CAPTIONED))
    for length, size in (("quick", _QUICK), ("normal", _NORMAL))
} | {
    "concept": {**_CONCEPT, **_NORMAL},
    "style": {**_STYLE, **_NORMAL},
    "captioned": {**_CAPTIONED, **_NORMAL},
}
"""Name ("concept", "style-quick", ...) -> field values."""


def with_preset(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` on top of the preset ``name``.

    Raises:
        InputError: there is no such preset.
    """
    if name not in PRESETS:
        raise InputError(f"There is no preset '{name}'{nearest(name, PRESETS)}; known are {', '.join(PRESETS)}.")
    return {**PRESETS[name], **values}
