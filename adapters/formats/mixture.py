"""Recognises the directory of a mixture of experts, without loading torch; :mod:`adapters.layers.experts` reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.formats.header import CONFIG

TYPE = "MOEADAPTER"
"""PEFT's name of the method, in ``adapter_config.json``."""

NOT_A_LORA = (
    "is a mixture of experts, whose update depends on the token: it can be used in chats, but not merged, converted or "
    "measured like a LoRA"
)


def mixture_config(path: Path) -> Mapping[str, Any] | None:
    """The configuration of the mixture in the directory ``path``; None if it is something else."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) and config.get("peft_type") == TYPE else None


def different_bases(bases: Mapping[str, str]) -> str:
    """Words for people if experts (name -> the base that each names, "" if none) are for different bases, else none."""
    of_base = {base: name for name, base in bases.items() if base}
    if len(of_base) < 2:
        return ""
    told = ", ".join(f"'{name}' for {base}" for base, name in of_base.items())
    return f"the experts name different bases ({told}): an expert works as trained only on its own"


def base_named(path: Path) -> str:
    """The base that the configuration of a PEFT directory names; "" if there is none."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    return str(config.get("base_model_name_or_path") or "") if isinstance(config, dict) else ""
