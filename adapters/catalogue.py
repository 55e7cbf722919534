"""The one list of methods.

A module that implements a method says so with a constant ``METHOD = Method(...)`` (or ``METHODS``, several). The
command line, the pages, the table in the README and a parametrised test read the list from here; adding a method is
adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Literal

from adapters.errors import InputError, nearest

Stage = Literal[
    "initialise", "learn", "layers", "compression", "merging", "compose", "federated", "generation", "serving",
    "inspection", "task",
]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: what commands and configurations call it.
        title: its name in words.
        summary: one sentence of help: what it does and when to use it.
        stage: where in an adapter's life it acts.
        makes: what comes out ("ordinary LoRA", "picture", "report").
        paper: title and arXiv id, empty for what has none.
        entry: ``"module:attribute"`` of the function or class that does it.
        status: "works" or, in plain words, what is missing.
    """

    name: str
    title: str
    summary: str
    stage: Stage
    makes: str
    paper: str
    entry: str
    status: str = "works"

    def load(self) -> object:
        """Import and return what ``entry`` names."""
        module, _, attribute = self.entry.partition(":")
        return getattr(importlib.import_module(module), attribute)


SEARCHED = ("adapters", "pipelines")
"""Packages whose modules may register methods (named as text: this package never depends on the others)."""


@cache
def methods() -> tuple[Method, ...]:
    """Every registered method, ordered by stage and name; raises ``ValueError`` for a name used twice in a stage."""
    found: dict[tuple[str, str], Method] = {}
    for module in _modules(SEARCHED):
        for method in _registered(module):
            if found.setdefault((method.stage, method.name), method) != method:
                raise ValueError(f"two methods are registered as {method.stage} '{method.name}'")
    return tuple(found[key] for key in sorted(found))


def stage(name: Stage) -> tuple[Method, ...]:
    """The methods of one stage."""
    return tuple(method for method in methods() if method.stage == name)


def find(stage_name: Stage, name: str) -> Method:
    """The method ``name`` of a stage, or an :class:`InputError` that lists the possible ones."""
    known = {method.name: method for method in stage(stage_name)}
    if name not in known:
        raise InputError(
            f"Unknown method '{name}'{nearest(name, known)}: {stage_name} offers {', '.join(known) or 'none'}."
        )
    return known[name]


def markdown_table(entries: Iterable[Method]) -> str:
    """The table of methods as the README shows it."""
    head = "| method | stage | what it does | paper | makes | status |\n|---|---|---|---|---|---|"
    rows = (
        f"| `{m.name}` {m.title} | {m.stage} | {m.summary} | {m.paper or '-'} | {m.makes} | {m.status} |"
        for m in entries
    )
    return "\n".join([head, *rows])


def _registered(module: ModuleType) -> tuple[Method, ...]:
    one = getattr(module, "METHOD", None)
    return (one,) if isinstance(one, Method) else tuple(getattr(module, "METHODS", ()))


def _modules(packages: Iterable[str]) -> Iterator[ModuleType]:
    for name in packages:
        package = importlib.import_module(name)
        yield package
        for info in pkgutil.walk_packages(package.__path__, prefix=f"{name}."):
            yield importlib.import_module(info.name)
