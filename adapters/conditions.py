"""Conditions on a configuration as short text: ``"dropout > 0 and optimizer not in ('adamw', 'sgd')"``.

They are written in a small subset of Python (comparisons, ``and``, ``or``, ``not``, plain values; names are fields) and
evaluated on the syntax tree, never executed. So declarations can hold them as data, and pages know which fields they
depend on.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

_COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}
_ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)


@cache
def names(text: str) -> frozenset[str]:
    """The fields a condition depends on.

    Raises:
        ValueError: the text is not such a condition.
    """
    tree = _parsed(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.expr | ast.cmpop) and not isinstance(node, _ALLOWED):
            raise ValueError(f"'{text}' is not a condition: compare fields with values, join with and, or, not")
    return frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))


def holds(text: str, value: Callable[[str], Any]) -> bool:
    """Whether a condition holds; ``value(field)`` gives the fields' values.

    An empty condition always holds. An order comparison (<, <=, >, >=) with None does not.
    """
    names(text)
    return bool(_value(_parsed(text), value))


_ALLOWED = (ast.BoolOp, ast.UnaryOp, ast.Compare, ast.Name, ast.Constant, ast.Tuple, *_COMPARED)


@cache
def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text or "True", mode="eval").body
    except SyntaxError:
        raise ValueError(f"'{text}' is not a condition: its syntax is invalid") from None


def _value(node: ast.expr, value: Callable[[str], Any]) -> Any:
    if isinstance(node, ast.Name):
        return value(node.id)
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Tuple):
        return tuple(_value(part, value) for part in node.elts)
    if isinstance(node, ast.BoolOp):
        choose = all if isinstance(node.op, ast.And) else any
        return choose(_value(part, value) for part in node.values)
    if isinstance(node, ast.UnaryOp):
        inner = _value(node.operand, value)
        return not inner if isinstance(node.op, ast.Not) else -inner
    assert isinstance(node, ast.Compare)
    operands = [_value(part, value) for part in (node.left, *node.comparators)]
    return all(
        False if isinstance(compare, _ORDER) and None in (left, right) else _COMPARED[type(compare)](left, right)
        for compare, left, right in zip(node.ops, operands, operands[1:], strict=False)
    )
