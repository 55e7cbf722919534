"""The one family of errors that people see.

A message is one or two sentences: what was given, what is possible, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StudioError(Exception):
    """Base of every error whose message is written for the person who caused it."""


class InputError(StudioError, ValueError):
    """A value, file or combination that cannot be used as given."""


class FamilyError(InputError):
    """An adapter and a base model that do not belong together."""


class MissingDependencyError(StudioError, ImportError):
    """An optional package that the requested feature needs."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed: "
            f"run  pip install 'adapter-studio[{extra}]'."
        )


class Cancelled(StudioError):
    """Work stopped because the person asked for it; what was finished is kept."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to ``name``, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""
