"""Lists of prompts: text files with one per line."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from adapters import files
from adapters.errors import InputError
from studio import settings


def clean(lines: Iterable[str]) -> list[str]:
    """The prompts among ``lines``, without empty ones."""
    return [line.strip() for line in lines if line.strip()]


def read_prompts(file: Path) -> list[str]:
    """The prompts of a text file.

    Raises:
        InputError: it is missing, not text, or empty.
    """
    try:
        prompts = clean(file.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"The prompts in '{file}' cannot be read: {reason}.") from None
    if not prompts:
        raise InputError(f"There are no prompts in '{file}': write one per line.")
    return prompts


def keep_prompts(text: str, name: str) -> Path:
    """Write the prompts in ``text`` to a file in the studio's home and return it; equal prompts give the same file.

    Raises:
        InputError: there are none.
    """
    prompts = clean(text.splitlines())
    if not prompts:
        raise InputError("There are no prompts yet: write some, one per line; twenty to two hundred work well.")
    whole = "\n".join(prompts) + "\n"
    stem = re.sub(r"[^\w-]+", "-", name).strip("-") or "prompts"
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return files.write_text(settings.folder("prompts") / f"{stem}-{digest}.txt", whole)
