"""The one list of methods.

A module that implements a method says so with a constant ``METHOD = Method(...)`` (or ``METHODS``, several). The
command line, the pages, the table in the README and a parametrised test read the list from here; adding a method is
adding a file: in this project, or in a package of your own that names its module as an entry point in the group
``adapter_studio.methods``. Declarations are read from the source text (:mod:`adapters.discovery`), so the list is there
without torch.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from adapters import discovery
from adapters.errors import InputError, nearest

Stage = Literal[
    "initialise", "learn", "layers", "compression", "merging", "compose", "federated", "generation", "serving",
    "inspection", "task",
]

Properties = TypeVar("Properties")

logger = logging.getLogger(__name__)


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
        properties: what callers of this stage must know of the method, as plain values by name; :meth:`typed` reads
            them as the dataclass that the stage defines.
    """

    name: str
    title: str
    summary: str
    stage: Stage
    makes: str
    paper: str
    entry: str
    status: str = "works"
    properties: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def load(self) -> object:
        """Import and return what ``entry`` names."""
        module, _, attribute = self.entry.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def typed(self, kind: type[Properties]) -> Properties:
        """The properties as ``kind``, a dataclass whose defaults stand for what the method does not say.

        Raises:
            ValueError: a property that ``kind`` does not have, or a value of another type.
        """
        known = get_type_hints(kind)
        for name, value in self.properties.items():
            if name not in known:
                raise ValueError(
                    f"method '{self.name}' has no property '{name}'{nearest(name, known)}: possible are "
                    f"{', '.join(item.name for item in fields(kind))}"  # type: ignore[arg-type]
                )
            if not _fits(value, known[name]):
                raise ValueError(f"method '{self.name}': property '{name}' cannot be {value!r}")
        return kind(**self.properties)


SEARCHED = ("adapters", "pipelines")
"""Packages whose modules may register methods (named as text: this package never depends on the others)."""


@cache
def methods() -> tuple[Method, ...]:
    """Every method, ordered by stage and name: ours, then those of installed packages.

    A package whose declaration cannot be used is left out with a warning that names it.

    Raises:
        ValueError: a name used twice in a stage, or a declaration of ours that cannot be read.
    """
    found: dict[tuple[str, str], Method] = {}
    for package in SEARCHED:
        _add(found, package)
    for distribution, module in discovery.installed():
        try:
            found |= _add(dict(found), module)
        except (OSError, SyntaxError, ValueError) as error:
            logger.warning("The methods of the package '%s' are left out: %s.", distribution, error)
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


def _add(found: dict[tuple[str, str], Method], module: str) -> dict[tuple[str, str], Method]:
    """``found`` with the methods of a module or package."""
    for file in discovery.sources(module):
        for method in discovery.declarations(file, {"Method": Method}):
            if found.setdefault((method.stage, method.name), method) != method:
                raise ValueError(f"two methods are registered as {method.stage} '{method.name}'")
    return found


def _fits(value: object, kind: Any) -> bool:
    """Whether a plain value has an annotated type (what is neither a plain type nor a Literal is not looked at)."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) is kind if kind in (bool, int, str) else kind is not float or type(value) in (int, float)
