"""Which settings of the gates are folded into the weights during a call (:mod:`adapters.layers.folded`).

Folding a setting costs about as much as the adapters do in ``ENOUGH`` calls of the denoiser, so a setting is folded if
it holds in at least as many, in a row (merge, a schedule with plateaus) or in turns (switch); in composite, where every
block of the batch has one adapter, the weights of all blocks are computed. Text encoders read a prompt only once or
twice per picture and are never folded. Either all settings that are worth it are folded, or none if their weights do
not fit into memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.layers.folded import Blocks

ENOUGH = 4
"""Fewest calls of the denoiser for which folding pays (``python -m benchmarks.composition --even``: after 2 to 5,
except in composite on the smallest pictures, where it hardly matters)."""

SHARE = 0.5
"""Share of the free memory that folded weights may use."""


@dataclass(frozen=True)
class Folds:
    """What is folded in a call.

    Attributes:
        settings: the settings of the gates that are folded.
        memory: bytes of all folded weights.
        missing: bytes that would be needed, if there is not enough memory.
    """

    settings: tuple[Blocks, ...] = ()
    memory: int = 0
    missing: int = 0


def folds(calls: Sequence[Blocks], each: int, free: int) -> Folds:
    """What to fold.

    Args:
        calls: the gates in every call of the denoiser.
        each: bytes of the weights of one block; 0 = no layer can be folded.
        free: bytes of free memory.
    """
    counts = Counter(calls)
    worth = tuple(blocks for blocks, count in counts.items() if count >= ENOUGH and any(map(any, blocks)))
    memory = each * sum(map(len, worth))
    if memory == 0:
        return Folds()
    return Folds(worth, memory) if memory <= SHARE * free else Folds(missing=memory)
