"""Which training methods go together: each method (and each slot for methods) declares what it refuses and what it
warns of.

Schemas refuse with :func:`refusal`; pages and commands show :func:`warnings`. A rule reads a configuration's fields;
missing ones count as switched off.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

from adapters import conditions
from adapters.catalogue import Choice, Method, choices
from adapters.options import Rule

GENERAL = (
    Rule(
        "ema and optimizer == 'schedulefree-adamw'",
        "schedule-free AdamW already averages the weights: switch ema off or choose another optimizer",
    ),
    Rule(
        "snapshots > 0 and use_dora",
        "snapshots are for a generator of adapters, which learns from plain LoRAs: leave out snapshots or use_dora",
    ),
)
"""Refused with every method."""

_OFF: dict[str, Any] = {
    "optimizer": "adamw", "rank_pattern": {}, "alpha_pattern": {}, "dropout": 0.0, "beta1": 0.9, "loraplus_ratio": 1.0,
}  # fmt: skip


def refusal(config: Any) -> str | None:
    """The sentence of the first refused combination in ``config``, or None."""
    value = _Values(config)
    general = [rule.sentence for rule in GENERAL if conditions.holds(rule.when, value)]
    return next(iter([*_sentences(config, "refused"), *general]), None)


def refuse(config: Any) -> None:
    """Raise ``ValueError`` with the sentence of :func:`refusal`, if there is one."""
    if sentence := refusal(config):
        raise ValueError(sentence)


def warnings(config: Any) -> list[str]:
    """Warnings about combinations that work but may surprise."""
    return list(_sentences(config, "warned"))


@cache
def looked_at() -> tuple[str, ...]:
    """The fields that any rule reads, and those that choose methods, in alphabetical order."""
    rules = [*GENERAL, *(rule for choice in choices() for method in choice.methods
                         for kind in ("refused", "warned") for rule in _rules(choice, method, kind))]  # fmt: skip
    fields = {name for rule in rules for name in conditions.names(rule.when)} - set(_OWN)
    return tuple(sorted(fields | {choice.key for choice in choices()}))


_OWN = ("sets", "looks_at")
"""Names in a condition that stand for the method's own facts."""


def _sentences(config: Any, kind: Literal["refused", "warned"]) -> Iterator[str]:
    for choice in choices():
        method = choice.chosen(_Values(config)(choice.key))
        if method is not None:
            value = _Values(config, method)
            yield from (rule.sentence for rule in _rules(choice, method, kind) if conditions.holds(rule.when, value))


def _rules(choice: Choice, method: Method, kind: str) -> tuple[Rule, ...]:
    """The rules of a slot (unless it has its usual value) and of the method in it."""
    place = getattr(choice.slot, kind) if choice.slot is not None and method.name != choice.slot.off else ()
    return (*place, *getattr(method.training, kind))


class _Values:
    """A configuration's fields by name; missing ones are off, missing options have their default."""

    def __init__(self, config: Any, method: Method | None = None) -> None:
        self._config, self._method = config, method

    def __call__(self, name: str) -> Any:
        if name in _OWN:
            return getattr(self._method.training, name) if self._method else None
        return getattr(self._config, name, _defaults().get(name))


@cache
def _defaults() -> dict[str, Any]:
    slots = {choice.key: choice.slot.off for choice in choices() if choice.slot is not None}
    return {**_OFF, **slots, **{option.name: option.default for choice in choices() for option in choice.options()}}


__all__ = ["GENERAL", "looked_at", "refusal", "refuse", "warnings"]
