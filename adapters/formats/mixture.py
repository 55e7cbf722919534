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
