"""Presets: starting values of a training by name, for the kinds of training that have some.

``preset`` is a key of the training schemas (:class:`~studio.training.schemas.base.TrainConfig`): a preset fills fields
below those that are given, wherever they are given (YAML, flag, form, Python).
"""

from __future__ import annotations

from typing import Any

from adapters.errors import InputError, nearest

Values = dict[str, Any]

_CONCEPT: Values = {
    "mode": "concept",
    "rank": 8,
    "targets": "attention",
    "learning_rate": 2e-4,
    "snr_gamma": 5.0,
    "ema": True,
    "ema_decay": 0.99,
}
_STYLE: Values = {
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
_CAPTIONED: Values = {
    "mode": "captioned",
    "rank": 16,
    "targets": "attention-mlp",
    "learning_rate": 1e-4,
    "snr_gamma": 5.0,
    "caption_dropout": 0.1,
    "ema": True,
}
_QUICK: Values = {"steps": 150, "batch_size": 2, "checkpoint_every": 100}
_NORMAL: Values = {"steps": 800, "batch_size": 4, "warmup_steps": 20, "checkpoint_every": 200}

_SIZES = {("style", "quick"): {**_QUICK, "steps": 300}}  # a look takes longer to learn than a thing

_IMAGE = {
    f"{kind}-{length}": {**values, **_SIZES.get((kind, length), size)}
    for kind, values in (("concept", _CONCEPT), ("style", _STYLE), ("captioned", _CAPTIONED))
    for length, size in (("quick", _QUICK), ("normal", _NORMAL))
}

PRESETS: dict[str, dict[str, Values]] = {
    "train-image": _IMAGE | {kind: _IMAGE[f"{kind}-normal"] for kind in ("concept", "style", "captioned")},
    "train-language": {
        "quick": {"steps": 60, "batch_size": 4, "learning_rate": 1e-3},
        "normal": {"steps": 300, "batch_size": 8, "learning_rate": 2e-4},
    },
    "train-vision-language": {
        "quick": {"steps": 60, "batch_size": 4, "learning_rate": 1e-3},
        "normal": {"steps": 300, "batch_size": 8, "learning_rate": 2e-4},
    },
    "train-rna": {
        "quick": {"steps": 100, "batch_size": 12, "learning_rate": 2e-3},
        "paper": {"mode": "full", "learning_rate": 5e-5, "lr_schedule": "linear", "weight_decay": 0.001,
                  "warmup_steps": 500, "batch_size": 64, "epochs": 10, "strands": "both"},
    },
    "distill": {
        "guidance": {"objective": "guidance", "steps": 500},
        "few-steps": {"objective": "consistency", "steps": 500},
    },
}
"""Kind of job -> name ("concept", "style-quick" ...) -> field values."""

MEASURED: dict[str, dict[str, Values]] = {
    "tinymoji": {
        "train-image": {"learning_rate": 2e-3, "targets": "all"},
        "distill": {"learning_rate": 2e-3, "rank": 16, "batch_size": 8, "knots": 20, "guidance": 4.0, "ema": True,
                    "ema_decay": 0.98},
        "distill few-steps": {"learning_rate": 2e-4},
    },
    "tinydit": {"train-image": {"learning_rate": 2e-3, "targets": "all", "snr_gamma": None}},
}  # fmt: skip
"""Base -> kind of job -> values that replace the defaults, and those of every preset: a base much smaller than usual
needs larger steps. "KIND PRESET" has what differs for one preset. What the presets for pictures reach there is in
benchmarks/results/presets.md; the values for distilling are those of the shipped adapters (assets/build/configs)."""


def fields(kind: str) -> set[str]:
    """The keys that presets of a kind of training set on some base."""
    known = [*PRESETS.get(kind, {}).values(), *(kinds.get(kind, {}) for kinds in MEASURED.values())]
    return {name for values in known for name in values}


def names(kind: str) -> tuple[str, ...]:
    """The presets of a kind of training."""
    return tuple(PRESETS.get(kind, ()))


def preset(kind: str, name: str, base: str) -> Values:
    """The values of the preset ``name`` on a base; for the empty name those that the base needs in place of defaults.

    Raises:
        InputError: there is no such preset.
    """
    known = PRESETS.get(kind, {})
    if name and name not in known:
        there = f"choose {', '.join(known)}" if known else f"there are none for {kind}; leave it empty"
        raise InputError(f"There is no preset '{name}'{nearest(name, known)}: {there}.")
    measured = MEASURED.get(base, {})
    return {**known.get(name, {}), **measured.get(kind, {}), **measured.get(f"{kind} {name}", {})}
