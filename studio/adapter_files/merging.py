"""Merge adapter files with any method of ``adapters/merging`` that takes ``(files, weights, rank, ...)``."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError, nearest

if TYPE_CHECKING:
    from adapters.formats import LoraFile
    from adapters.merging.concatenate import Merged

DEFAULT = "concatenate"
RECORD = "adapter_studio_merge"
"""Metadata entry of a merged file that says how it was made, as JSON."""


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
    weights: Sequence[Mapping[str, float] | float],
    rank: int | None = None,
    options: Mapping[str, Any] | None = None,
    factors: Sequence[Mapping[str, float]] = (),
) -> Merged:
    """Merge adapters into one.

    Args:
        method: a name of :func:`methods`.
        weights: per file one weight, or (concatenate) a weight per component.
        rank: cut the result to this rank; None = no cut.
        options: the method's own options.
        factors: concatenate: per file "component.module" -> extra factor; absent = 1.

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
    from adapters.formats.words import with_words_of

    more = {"factors": factors} if factors else {}
    merged: Merged = function(files, weights, rank=rank, **more, **(options or {}))
    record = {
        "method": method,
        "rank": rank,
        "options": dict(options or {}),
        "adapters": [
            {"name": file.path.stem if file.path else "", "sha256": file.sha256, "weight": _plain(weight)}
            for file, weight in zip(files, weights, strict=True)
        ],
        "layers": {name: dict(values) for name, values in merged.report.items()},
    }
    metadata = {**merged.file.metadata, RECORD: json.dumps(record)}
    return replace(merged, file=replace(with_words_of(merged.file, files), metadata=metadata))


def _plain(weight: Mapping[str, float] | float) -> dict[str, float] | float:
    return weight if isinstance(weight, int | float) else dict(weight)
