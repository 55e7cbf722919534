"""The errors that users see.

A message is one or two sentences: what was given, what is possible, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StudioError(Exception):
    """Base class of errors whose message is written for the user."""


class InputError(StudioError, ValueError):
    """A value, file or combination that cannot be used as given."""


class FamilyError(InputError):
    """An adapter that does not fit the base model, or models that do not belong together."""


class MissingDependencyError(StudioError, ImportError):
    """An optional package that a requested feature needs is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed: "
            f"run  pip install 'adapter-studio[{extra}]'."
        )


class Cancelled(StudioError):
    """Work stopped at the user's request; finished parts are kept."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` with the known name closest to ``name``, or an empty string if none is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""
