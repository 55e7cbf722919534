"""Chats with a language model, or about a picture, with adapters.

They run in this process (``session``) or in a separate one (``client``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from adapters.errors import InputError

Message = dict[str, str]


@dataclass(frozen=True)
class Variant:
    """A variant of the base that answers: the updates of these adapters (name or path, strength) are added to it."""

    name: str
    adapters: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Question:
    """One turn: a base, and every variant's conversation so far, ending with the question.

    Attributes:
        base: library name, directory or hub id.
        variants: in the order in which they answer.
        conversations: one per variant.
        sampling: fields of :class:`pipelines.language.answer.Sampling`.
        quantization: how the base is stored, see :mod:`adapters.compression.backends`.
        picture: what a vision-language base is asked about, a path or ``data:`` URI; empty for a language model.
    """

    base: str
    variants: tuple[Variant, ...]
    conversations: tuple[tuple[Message, ...], ...]
    device: str = "auto"
    dtype: str = "auto"
    sampling: Mapping[str, Any] = field(default_factory=dict)
    quantization: str = "none"
    picture: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Question:
        """The inverse of :meth:`as_json`."""
        variants = tuple(
            Variant(str(variant["name"]), tuple((str(name), float(weight)) for name, weight in variant["adapters"]))
            for variant in values["variants"]
        )
        talks = tuple(tuple(dict(message) for message in talk) for talk in values["conversations"])
        return cls(
            values["base"], variants, talks, values["device"], values["dtype"], dict(values["sampling"]),
            values["quantization"], values.get("picture", ""),
        )  # fmt: skip


def parse_adapter(text: str) -> tuple[str, float]:
    """``name`` or ``name:0.7`` as (name or path, strength).

    Raises:
        InputError: there is no name.
    """
    name, colon, weight = text.rpartition(":")
    try:
        parsed = (name, float(weight)) if colon else (text, 1.0)
    except ValueError:  # a path with a colon
        parsed = (text, 1.0)
    if not parsed[0].strip():
        raise InputError(f"An adapter is name[:strength], got '{text}'.")
    return parsed


def variants_of(adapters: Iterable[tuple[str, float]], compare: bool) -> tuple[Variant, ...]:
    """One variant with all adapters at once; or, to compare, the base alone and each adapter by itself.

    An adapter given several times gets the sum of its strengths.
    """
    total: dict[str, float] = {}
    for name, weight in adapters:
        total[name] = total.get(name, 0.0) + weight
    chosen = tuple(total.items())
    if not compare:
        return (Variant(" + ".join(name for name, _ in chosen) or "base", chosen),)
    return (Variant("base"), *(Variant(name, ((name, weight),)) for name, weight in chosen))
