"""Continues an adapter that brings whole modules (pooler, classifier) besides its low-rank pairs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from adapters.errors import InputError


def take_up(model: Any, place: Path) -> None:
    """Set the adapter of a PEFT model to the one in the folder ``place``; a different scale is folded into B.

    Raises:
        InputError: it has other layers or other ranks, or it is no plain PEFT folder.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

    file = place / "adapter_model.safetensors"
    if not file.is_file():
        raise InputError(f"'{place}' is no PEFT folder with adapter_model.safetensors, which could be continued.")
    state = load_file(file)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = sorted(own.keys() ^ state.keys()) or [n for n, t in own.items() if t.shape != state[n].shape]
    if wrong:
        raise InputError(
            f"The adapter to continue from, '{place.name}', has other layers or another rank (first difference: "
            f"'{wrong[0]}'): choose method, rank and targets as it has them."
        )
    before, now = PeftConfig.from_pretrained(str(place)), model.peft_config["default"]
    if any(config.rank_pattern or config.alpha_pattern for config in (before, now)):
        raise InputError("Adapters with ranks or alphas of their own for some layers cannot be continued.")
    factor = _scale(before) / _scale(now)
    set_peft_model_state_dict(model, {n: t * factor if ".lora_B." in n else t for n, t in state.items()})


def _scale(config: Any) -> float:
    return float(config.lora_alpha) / (math.sqrt(config.r) if config.use_rslora else config.r)
