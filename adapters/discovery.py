"""Finding declarations (``METHOD = Method(...)``) in source text, without importing the modules.

Pages and ``--help`` must start quickly and never load torch, which the modules of methods import. So a declaration may
only use plain values: text, numbers, tuples, dictionaries, names of constants in the same file, and calls of the
catalogue's own dataclasses.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

GROUP = "adapter_studio.methods"
"""Group of the entry points by which installed packages name their modules with methods."""


def sources(name: str) -> list[Path]:
    """The source files of a module, or of a package and all below it, found without importing it.

    Raises:
        ValueError: there is no such module, or its source is not available.
    """
    spec, path = None, None
    for part in _prefixes(name):
        spec = PathFinder.find_spec(part, path) if path is not None else importlib.util.find_spec(part)
        if spec is None:
            raise ValueError(f"there is no module '{part}'")
        path = list(spec.submodule_search_locations or [])
    assert spec is not None
    if path:
        return [file for folder in path for file in sorted(Path(folder).rglob("*.py"))]
    if not (spec.origin or "").endswith(".py"):
        raise ValueError(f"'{name}' has no source text to read declarations from")
    return [Path(str(spec.origin))]


def installed() -> Iterator[tuple[str, str]]:
    """(distribution or entry point name, module) of every entry point in :data:`GROUP`."""
    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: (point.module, point.name)):
        yield (point.dist.name if point.dist else point.name), point.module


def objects(modules: Iterable[str], constant: str, kind: Any, group: str) -> dict[str, Any]:
    """Name -> the object called ``constant``, from ``modules`` and from packages' entry points in ``group``.

    Only objects of the type ``kind`` count; they have a ``name`` and an ``order``, by which they are sorted. The
    modules are imported.

    Raises:
        ValueError: two objects have the same name.
    """
    points = [point.value for point in importlib.metadata.entry_points(group=group)]
    found: dict[str, Any] = {}
    for module in (*modules, *points):
        made: Any = getattr(importlib.import_module(module), constant, None)
        if isinstance(made, kind) and found.setdefault(made.name, made) is not made:
            raise ValueError(f"two objects of {group} are called '{made.name}'")
    return dict(sorted(found.items(), key=lambda pair: (pair[1].order, pair[0])))


def declarations(file: Path, calls: Mapping[str, Callable[..., Any]], constant: str = "METHOD") -> list[Any]:
    """The declarations in ``METHOD`` (one) and ``METHODS`` (a tuple) of a file, or in another ``constant``.

    Args:
        calls: name -> dataclass that a declaration may use.

    Raises:
        ValueError: a declaration uses more than plain values (the message names file and line).
    """
    text, several = file.read_text(encoding="utf-8"), f"{constant}S"
    start = max((found.start() for found in re.finditer(rf"^{constant}S?\b", text, re.MULTILINE)), default=None)
    if start is None:
        return []
    constants = _constants(_parsed(text, start))
    try:
        one = [_value(constants[constant], constants, calls)] if constant in constants else []
        return [*one, *(_value(constants[several], constants, calls) if several in constants else ())]
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None


def _parsed(text: str, start: int) -> ast.Module:
    """The module up to the end of the statement at ``start``, which cannot use what follows; a part parses faster."""
    following = re.compile(r"^[A-Za-z_@]", re.MULTILINE).search(text, start + 1)
    try:
        return ast.parse(text[: following.start() if following else None])
    except SyntaxError:  # a string over several lines
        return ast.parse(text)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            found |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = node.value
    return found


def _value(node: ast.expr, constants: Mapping[str, ast.expr], calls: Mapping[str, Callable[..., Any]]) -> Any:
    def value(part: ast.expr) -> Any:
        return _value(part, constants, calls)

    if isinstance(node, ast.Tuple | ast.List):
        items: list[Any] = []
        for part in node.elts:
            items.extend(value(part.value) if isinstance(part, ast.Starred) else [value(part)])
        return tuple(items)
    if isinstance(node, ast.Dict):
        return {value(k): value(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    if isinstance(node, ast.Name) and node.id in constants:
        return value(constants[node.id])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in calls:
        named = {word.arg: value(word.value) for word in node.keywords if word.arg}
        return calls[node.func.id](*map(value, node.args), **named)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(
            f"line {node.lineno}: '{ast.unparse(node)}' is not a plain value, as METHOD requires (it is read without "
            "importing the module)"
        ) from None
