"""The catalogue's methods, read from the source text instead of by importing it.

Pages must start quickly and never load torch, while :func:`adapters.catalogue.methods` imports every module. A method
is declared with plain values (``METHOD = Method(name="merge", ...)``), so its text says everything.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from adapters.catalogue import SEARCHED, Method, Stage
from adapters.errors import InputError, nearest


@cache
def declared() -> tuple[Method, ...]:
    """Every declared method, in the order of :func:`adapters.catalogue.methods`."""
    found = {(method.stage, method.name): method for path in _sources() for method in _in_file(path)}
    return tuple(found[key] for key in sorted(found))


def stage(name: Stage) -> tuple[Method, ...]:
    """The declared methods of one stage."""
    return tuple(method for method in declared() if method.stage == name)


def check(name: str, stage_: Stage) -> None:
    """Raise :class:`InputError`, with the nearest name, unless there is a method ``name`` in the stage."""
    known = [method.name for method in stage(stage_)]
    if name not in known:
        raise InputError(f"Unknown method '{name}'{nearest(name, known)}: possible are {', '.join(known)}.")


def _sources() -> Iterator[Path]:
    for package in SEARCHED:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            yield from sorted(Path(folder).rglob("*.py"))


def _in_file(path: Path) -> Iterator[Method]:
    text = path.read_text(encoding="utf-8")
    if "METHOD" not in text:
        return
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets: list[ast.expr] = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            if names & {"METHOD", "METHODS"}:
                yield from _calls(node.value)


def _calls(node: ast.expr) -> Iterator[Method]:
    for part in node.elts if isinstance(node, ast.Tuple | ast.List) else [node]:
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "Method":
            positional = dict(zip(Method.__dataclass_fields__, map(ast.literal_eval, part.args), strict=False))
            named = {word.arg: ast.literal_eval(word.value) for word in part.keywords if word.arg}
            yield Method(**positional, **named)
