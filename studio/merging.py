"""Merge adapter files with any method of ``adapters/merging`` that takes ``(files, weights, rank, ...)``."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError, nearest

if TYPE_CHECKING:
    from adapters.formats import LoraFile
    from adapters.merging.concatenate import Merged

DEFAULT = "concatenate"


@cache
def methods() -> dict[str, Any]:
    """Name -> function of (files, weights, rank, ...), of every method that merges files as they are."""
    package = importlib.import_module("adapters.merging")
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"adapters.merging.{info.name}")
        for method in (getattr(module, "METHOD", None), *getattr(module, "METHODS", ())):
            if method is not None and method.stage == "merging":
                function = method.load()
                if {"files", "weights", "rank"} <= set(inspect.signature(function).parameters):
                    found[method.name] = function
    return found


def merge(
    method: str,
    files: Sequence[LoraFile],
    weights: Sequence[float],
    rank: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Merged:
    """The adapters as one.

    Args:
        method: a name of :func:`methods`.
        rank: cut the result to this rank.
        options: what the method knows beside files, weights and rank.

    Raises:
        InputError: an unknown method, or an option it does not have.
    """
    if method not in methods():
        raise InputError(
            f"Unknown method '{method}'{nearest(method, methods())}: files merge with {', '.join(methods())}."
        )
    function = methods()[method]
    known = [
        name for name in inspect.signature(function).parameters if name not in ("files", "weights", "rank", "factors")
    ]
    for name in options or {}:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(f"The method '{method}' has no option '{name}'{nearest(name, known)}: {has}.")
    merged: Merged = function(files, weights, rank=rank, **(options or {}))
    return merged
