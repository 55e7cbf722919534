"""Shared files name other files, but never the folders of somebody's disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def names_only(value: Any) -> Any:
    """``value`` (JSON) with every path of this machine cut to the name of its file or folder.

    Text counts as a path when it is absolute, or begins with ``~``, and exists; so prompts stay as they are.
    """
    if isinstance(value, dict):
        return {key: names_only(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [names_only(inner) for inner in value]
    return _name(value) if (isinstance(value, str) and value[:1] in ("/", "~", "\\")) or _has_drive(value) else value


def _has_drive(value: Any) -> bool:
    return isinstance(value, str) and value[1:3] in (":\\", ":/")


def _name(text: str) -> str:
    try:
        path = Path(text).expanduser()
        return path.name if path.name and path.is_absolute() and path.exists() else text
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown person behind ~
        return text
