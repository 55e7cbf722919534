"""Conditions on a configuration: what they mean, what they look at, and that nothing else is run."""

from __future__ import annotations

import pytest

from adapters import conditions

VALUES = {"rank": 4, "alpha": None, "dropout": 0.1, "optimizer": "sgd", "dora": False, "pattern": {}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("dropout > 0 and not dora", True),
        ("alpha not in (None, rank) or pattern", False),
        ("optimizer in ('adamw', 'sgd') and 1 < rank <= 4", True),
        ("alpha > 3", False),
        ("alpha < 3", False),
        ("rank != 4 or alpha is None", True),
        ("dropout == -0.1", False),
    ],
)
def test_meaning(text: str, expected: bool) -> None:
    assert conditions.holds(text, VALUES.__getitem__) is expected


def test_fields_it_looks_at() -> None:
    assert conditions.names("a == 'b' and (c or not d > 1)") == {"a", "c", "d"}


@pytest.mark.parametrize("text", ["print(1)", "a.b", "a[0]", "a = 1", "a + b > 1", "lambda: 1", "a >"])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a condition"):
        conditions.names(text)
