"""Step schedules and the methods' plans: pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters import catalogue
from adapters.errors import InputError
from pipelines.diffusion import methods
from pipelines.diffusion.methods import composite, merge, switch
from pipelines.diffusion.schedule import check_keyframes, factor_at, window

points = st.lists(st.tuples(st.floats(0, 1), st.floats(-2, 2)), min_size=1, max_size=5).map(
    lambda made: sorted(made, key=lambda point: point[0])
)


@given(points, st.floats(0, 1))
def test_factor_stays_between_its_keyframes(keyframes: list[tuple[float, float]], progress: float) -> None:
    factors = [factor for _, factor in keyframes]
    assert min(factors) - 1e-9 <= factor_at(keyframes, progress) <= max(factors) + 1e-9


@given(points)
def test_factor_is_exact_at_the_last_keyframe_of_a_place(keyframes: list[tuple[float, float]]) -> None:
    place = keyframes[0][0]
    assert factor_at(keyframes, place) == [factor for progress, factor in keyframes if progress == place][-1]


def test_interpolation_and_ends() -> None:
    keyframes = [(0.25, 0.0), (0.75, 1.0)]
    assert [factor_at(keyframes, p) for p in (0, 0.25, 0.5, 0.75, 1)] == [0, 0, 0.5, 1, 1]
    assert factor_at([], 0.3) == 1


@pytest.mark.parametrize(("start", "end"), [(0, 0.4), (0.4, 1), (0.2, 0.6), (0, 1)])
def test_window_is_half_open(start: float, end: float) -> None:
    keyframes = check_keyframes(window(start, end), "x")
    steps = [k / 10 for k in range(10)]
    assert [factor_at(keyframes, p) for p in steps] == [1.0 if start <= p < end else 0.0 for p in steps]


def test_empty_window() -> None:
    with pytest.raises(InputError, match="step range"):
        window(0.5, 0.5)


def test_turns() -> None:
    assert [switch.turn(k, 2, 3) for k in range(8)] == [0, 0, 0, 1, 1, 1, 0, 0]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 30))
def test_switch_uses_one_adapter_and_never_more_turns_than_steps(count: int, tau: int, total: int) -> None:
    steps = switch.steps(((1.0,) * count,) * total, tau=tau)
    assert all(len(step.active) == 1 and step.forwards == 1 for step in steps)
    if total == count * tau:
        assert [sum(step.active == (i,) for step in steps) for i in range(count)] == [tau] * count


def test_forwards() -> None:
    rows = ((1.0, 0.5), (0.0, 0.5), (0.0, 0.0))
    assert [step.forwards for step in merge.steps(rows)] == [1, 1, 1]
    assert [step.forwards for step in composite.steps(rows)] == [2, 1, 1]


def test_methods_are_listed_and_take_their_own_options() -> None:
    assert set(methods.names()) == {method.name for method in catalogue.stage("compose")}
    assert {"composite", "merge", "switch", "activation"} <= set(methods.names())
    steps = methods.plan_steps("switch", ((1.0, 1.0),) * 4, tau=2, unknown=3)
    assert [step.active for step in steps] == [(0,), (0,), (1,), (1,)]
