"""The list of all methods.

A module that implements a method declares it with a constant ``METHOD = Method(...)`` (or ``METHODS``, a tuple). The
command line, the pages, the table in the docs and a parametrised test use this list, so adding a method is adding a
file: in this project, or in your own package with an entry point in the group ``adapter_studio.methods`` that names the
module. Declarations are read from the source text (:mod:`adapters.discovery`), so listing methods does not load torch.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from adapters import discovery
from adapters.errors import InputError, nearest
from adapters.options import SLOTS, Option, Rule, Slot, Training

Stage = Literal[
    "initialise",
    "learn",
    "layers",
    "compression",
    "merging",
    "compose",
    "federated",
    "generation",
    "serving",
    "inspection",
    "task",
]

Properties = TypeVar("Properties")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: its name in commands and configurations.
        title: its name for people.
        summary: one sentence: what it does and when to use it.
        stage: the kind of work it belongs to.
        makes: its result ("ordinary LoRA", "picture", "report").
        paper: title and arXiv id; empty if there is none.
        entry: ``"module:attribute"`` of the function or class that implements it.
        status: "works", or in plain words what is missing.
        properties: what callers of this stage need to know of the method, as plain values by name; :meth:`typed` reads
            them as the stage's dataclass.
        training: its options and how it takes part in training; None for other methods.
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
    training: Training | None = None

    def load(self) -> object:
        """Import and return the object named by ``entry``."""
        module, _, attribute = self.entry.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def typed(self, kind: type[Properties]) -> Properties:
        """The properties as ``kind``, a dataclass whose defaults fill in what the method leaves out.

        Raises:
            ValueError: a property that ``kind`` does not have, or a value of the wrong type.
        """
        known = _types(cast(Any, kind))
        for name, value in self.properties.items():
            if name not in known:
                raise ValueError(
                    f"method '{self.name}' has no property '{name}'{nearest(name, known)}: possible are "
                    f"{', '.join(item.name for item in fields(kind))}"  # type: ignore[arg-type]
                )
            if not _fits(value, known[name]):
                raise ValueError(f"method '{self.name}': property '{name}' cannot be {value!r}")
        return kind(**self.properties)


@cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


SEARCHED = ("adapters", "pipelines")
"""Packages searched for methods (by name only: this package does not depend on the others)."""

DECLARED = {"Method": Method, "Option": Option, "Rule": Rule, "Training": Training}
"""Dataclasses that a declaration may use."""


@cache
def methods() -> tuple[Method, ...]:
    """Every method, ours and those of installed packages, ordered by stage and name.

    A package whose declaration cannot be used is left out, with a warning that names it.

    Raises:
        ValueError: two of our methods share a name in a stage, or one of our declarations cannot be read.
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


@dataclass(frozen=True)
class Choice:
    """A field that chooses a training method: a slot, or the switch of a single method."""

    key: str
    methods: tuple[Method, ...]
    slot: Slot | None = None

    def chosen(self, value: Any) -> Method | None:
        """The method chosen by a value of the field, or None."""
        if self.slot is None:
            return self.methods[0] if value else None
        return next((method for method in self.methods if method.name == value), None)

    def options(self) -> dict[Option, tuple[str, ...]]:
        """Its options in order -> names of the methods that use each."""
        shared = self.slot.options if self.slot else ()
        found = {item: tuple(m.name for m in self.methods if item.name in _training(m).shared) for item in shared}
        for method in self.methods:
            for item in _training(method).options:
                found[item] = (*found.get(item, ()), method.name)
        return found


@cache
def choices() -> tuple[Choice, ...]:
    """The fields that choose training methods, in the order in which they act: initialisation, learning, others."""
    by_key: dict[str, list[Method]] = {slot.key: [] for slot in SLOTS}
    for method in sorted(methods(), key=lambda method: (method.stage != "learn", method.name)):
        if method.training is not None:
            by_key.setdefault(method.training.key, []).append(method)
    slots = {slot.key: slot for slot in SLOTS}
    first, *rest = slots
    learning = [key for key, found in by_key.items() if key not in slots and found[0].stage == "learn"]
    others = [key for key in by_key if key not in slots and key not in learning]
    return tuple(Choice(key, tuple(by_key[key]), slots.get(key)) for key in [first, *learning, *rest, *others])


def _training(method: Method) -> Training:
    assert method.training is not None
    return method.training


def find(stage_name: Stage, name: str) -> Method:
    """The method ``name`` of a stage, or an :class:`InputError` that lists the possible ones."""
    known = {method.name: method for method in stage(stage_name)}
    if name not in known:
        raise InputError(
            f"Unknown method '{name}'{nearest(name, known)}: {stage_name} offers {', '.join(known) or 'none'}."
        )
    return known[name]


def markdown_table(entries: Iterable[Method]) -> str:
    """The table of methods for the documentation."""
    head = "| method | stage | what it does | paper | makes | status |\n|---|---|---|---|---|---|"
    rows = (
        f"| `{m.name}` {m.title} | {m.stage} | {m.summary} | {m.paper or '-'} | {m.makes} | {m.status} |"
        for m in entries
    )
    return "\n".join([head, *rows])


def _add(found: dict[tuple[str, str], Method], module: str) -> dict[tuple[str, str], Method]:
    """``found`` with the methods of a module or package."""
    for file in discovery.sources(module):
        for method in discovery.declarations(file, DECLARED):
            if found.setdefault((method.stage, method.name), method) != method:
                raise ValueError(f"two methods are registered as {method.stage} '{method.name}'")
    _check_options(found.values())
    return found


def _check_options(entries: Iterable[Method]) -> None:
    """Refuse one key declared as two different options, and a method that nothing can choose."""
    known = {item.name: item for slot in SLOTS for item in slot.options}
    for method in entries:
        for item in method.training.options if method.training else ():
            if known.setdefault(item.name, item) != item or item.name in (slot.key for slot in SLOTS):
                raise ValueError(f"method '{method.name}' declares the option '{item.name}', which already exists")
        if method.training and method.training.key not in {*(slot.key for slot in SLOTS), *known}:
            raise ValueError(f"method '{method.name}' is chosen by '{method.training.key}', which is not an option")


def _fits(value: object, kind: Any) -> bool:
    """Whether a plain value has an annotated type (types other than plain ones and Literal are not checked)."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) is kind if kind in (bool, int, str) else kind is not float or type(value) in (int, float)
