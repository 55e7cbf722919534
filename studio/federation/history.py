"""The rounds of a federation as a file, one line each: what pages draw. Torch is not needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HISTORY = "rounds.jsonl"

WORTH = ("accuracy", "macro_f1", "validation_loss", "perplexity")
"""Measures by which rounds are compared, the first that clients have."""


def read_history(folder: Path) -> list[Mapping[str, Any]]:
    """The rounds so far; empty when there are none."""
    file = folder / HISTORY
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
