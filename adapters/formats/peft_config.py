"""The part of PEFT's ``LoraConfig`` that sets the scale of an update: alpha, rank, rsLoRA.

Read from ``adapter_config.json`` (PEFT) or from the safetensors entry ``lora_adapter_metadata`` (diffusers).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from adapters.errors import InputError
from adapters.formats.lora import LoraLayer
from adapters.formats.peft_options import kind_of

_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")
_LONGEST_PATTERN = 500


def alpha_of(config: Mapping[str, Any], module: str, source: str) -> float:
    """The alpha of one module: that of a pattern, or the common one (PEFT's default is 8).

    Raises:
        InputError: alpha is not a finite number, or a pattern is invalid.
    """
    common = "lora_alpha" if kind_of(config) == "LORA" else "alpha"
    return _number(_of_pattern(config, "alpha_pattern", module, config.get(common, 8), source), source)


def scale_of(config: Mapping[str, Any], module: str, source: str) -> float:
    """PEFT's scale of a LoHa or LoKr, alpha / r with the configured r, whatever the tensors' rank.

    Raises:
        InputError: rank or alpha is invalid.
    """
    rank = _number(_of_pattern(config, "rank_pattern", module, config.get("r", 8), source), source)
    if rank < 1:
        raise InputError(f"{source} gives '{module}' the rank {rank:g}, which is below 1.")
    return alpha_of(config, module, source) / rank


def config_of(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """The ``LoraConfig`` values with which PEFT and diffusers restore ``layers`` exactly.

    Raises:
        InputError: layers of different kinds.
    """
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values() if layer.rank == rank).most_common(1)[0][0]
    kinds = {(layer.rslora, layer.magnitude is not None) for layer in layers.values()}
    if len(kinds) != 1:
        raise InputError("Layers of different kinds (LoRA, rsLoRA, DoRA) cannot be in one PEFT configuration.")
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


def _of_pattern(config: Mapping[str, Any], entry: str, module: str, default: Any, source: str) -> Any:
    """PEFT's rule: the value of the first key that matches the end of the module's name, as a regular expression."""
    patterns = config.get(entry) or {}
    if not isinstance(patterns, Mapping):
        raise InputError(f"{source}: its {entry} is not a table.")
    for key, value in patterns.items():
        if module == key or module.endswith(f".{key}"):
            return value
        if len(key) > _LONGEST_PATTERN or key.count("*") + key.count("+") > 4 or _REPEATED_GROUP.search(key):
            raise InputError(f"{source}: the {entry} key '{key[:60]}' could take forever to match.")
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise InputError(f"{source}: the {entry} key '{key[:60]}' is not a valid pattern ({error}).") from None
    return default


def _number(value: Any, source: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{source} has a rank or alpha that is not a finite number: {str(value)[:60]}.")
    return float(value)
