"""The part of PEFT's ``LoraConfig`` that decides what the tensors mean: alpha, rsLoRA, and what is refused.

Read from ``adapter_config.json`` (PEFT) or from the safetensors entry ``lora_adapter_metadata`` (diffusers).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from adapters.errors import InputError
from adapters.formats.lora import LoraLayer


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse what is not a plain LoRA or DoRA.

    Raises:
        InputError: another method, trained biases, or whole modules saved beside the LoRA.
    """
    kind = str(config.get("peft_type") or "LORA").rpartition(".")[2].upper()
    if kind != "LORA":
        raise InputError(f"{source} holds a {kind} adapter; only LoRA and DoRA are read yet.")
    if config.get("modules_to_save"):
        raise InputError(
            f"{source} also replaces whole modules ({config['modules_to_save']}), which cannot be composed."
        )
    if config.get("lora_bias") or config.get("bias", "none") not in (None, "none"):
        raise InputError(f"{source} also trains biases, which cannot be composed.")
    if config.get("fan_in_fan_out"):
        raise InputError(
            f"{source} is made for transposed layers (fan_in_fan_out), which diffusion models do not have."
        )


def alpha_of(config: Mapping[str, Any], module: str) -> float:
    """The alpha of one module: a pattern's, or the common one (PEFT's default is 8)."""
    pattern = config.get("alpha_pattern") or {}
    return float(_of_pattern(pattern, module, config.get("lora_alpha", 8)))


def config_of(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """The ``LoraConfig`` values with which PEFT and diffusers rebuild ``layers`` exactly."""
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values() if layer.rank == rank).most_common(1)[0][0]
    kinds = {(layer.rslora, layer.magnitude is not None) for layer in layers.values()}
    if len(kinds) != 1:
        raise InputError("Layers with different kinds (LoRA, rsLoRA, DoRA) cannot stand in one PEFT configuration.")
    rslora, dora = kinds.pop()
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: layer.rank for name, layer in sorted(layers.items()) if layer.rank != rank},
        "alpha_pattern": {name: layer.alpha for name, layer in sorted(layers.items()) if layer.alpha != alpha},
        "target_modules": sorted(layers),
        "use_rslora": rslora,
        "use_dora": dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
    }


def _of_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that is the module's name or the end of it, as a regular expression."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)
