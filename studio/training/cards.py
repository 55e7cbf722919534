"""Shared parts of adapter cards: the front matter that a model hub reads, and code that loads the adapter.

As a base the hub accepts only its own ids ("owner/name"), and nobody else has the folders of this machine: a base
without an id is named in words, and its code asks the library for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from studio.library import packaged
from studio.library.resolve import HUB_ID

if TYPE_CHECKING:
    from studio.library import Record



def hub_id(base: str) -> str:
    """The hub id of a base, empty if it has none."""
    if base in (known := packaged.known()):
        return known[base].hub
    local = Path(base).expanduser().exists() or base.startswith((".", "~", "/"))
    return base if HUB_ID.fullmatch(base) and not local else ""


def base_name(base: str) -> str:
    """A base's name in a card: of a path only the last part."""
    return hub_id(base) or Path(base).name


def front_matter(base: str, library: str, tags: Sequence[str], **more: Any) -> list[str]:
    """The lines between ``---``: base_model, library_name, tags, license if the base's is known, and ``more``."""
    values: dict[str, Any] = {"base_model": hub_id(base), "library_name": library, "tags": list(tags),
                              "license": _license(base), **more}  # fmt: skip
    text = yaml.safe_dump({key: value for key, value in values.items() if value}, allow_unicode=True, sort_keys=False,
                          width=10_000)  # fmt: skip
    return ["---", *text.splitlines(), "---"]


def base_lines(base: str) -> list[str]:
    """Lines of Python that set ``base`` to what ``from_pretrained`` opens."""
    if found := hub_id(base):
        return [f'base = "{found}"']
    if _of_library(base) is not None and "/" not in base:
        return ["from studio import library", f"base = library.resolve_base({base!r})"]
    return [f"base = {Path(base).name!r}  # the folder of the base model"]


def _license(base: str) -> str:
    """The license in the card of a base in the library; what is derived from the base is under it too."""
    known = _of_library(base)
    return str((known.notes if known else {}).get("license") or "")


def _of_library(base: str) -> Record | None:
    from studio import library

    return next((record for record in library.bases() if base in (record.name, str(record.path))), None)


def card_words(recipe: Mapping[str, Any]) -> str:
    """The trigger word of a recipe, empty if there is none."""
    return ", ".join(str(word) for word in recipe.get("triggers") or ())
