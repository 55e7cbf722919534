"""What a classifier's ``config.json`` says, without torch: its classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapters.errors import InputError


def known_labels(source: str) -> list[str]:
    """The classes of a classifier in a folder, without loading it; empty if it names none."""
    config = config_of(Path(source))
    named = config.get("id2label") or {}
    labels = [str(named[key]) for key in sorted(named, key=int)] or [str(n) for n in config.get("label_names") or ()]
    return [] if all(label.startswith("LABEL_") for label in labels) else labels


def config_of(place: Path) -> dict[str, Any]:
    """The configuration in a folder, empty without one; raises :class:`InputError` for a damaged file."""
    file = place / "config.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"'{file}' is not valid JSON.") from None
    return found if isinstance(found, dict) else {}
