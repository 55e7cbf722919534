"""Usable models and adapters of one family in the library, as choices of a menu."""

from __future__ import annotations

from studio import library

Choices = list[tuple[str, str]]


def bases(family: str) -> Choices:
    """(shown, name) of every base of the family that can be used, with its architecture."""
    found = [record for record in library.bases() if record.family == family and not record.problem]
    return [(f"{record.name}   {record.notes.get('architecture', '')}", record.name) for record in found]


def adapters(family: str) -> Choices:
    """(shown, name) of every adapter of the family that can be used, with its rank."""
    found = [record for record in library.adapters() if record.family == family and not record.problem]
    return [(f"{record.name}   rank {record.rank}", record.name) for record in found]
