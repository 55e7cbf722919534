"""Which settings of the gates are folded into the weights during a call (:mod:`adapters.layers.folded`).

Folding a setting costs about what the adapters cost in ``ENOUGH`` calls of the denoiser, so a setting is folded that
holds in at least as many, whether in a row (merge, a schedule with plateaus) or in turns (switch); in composite, where
every block of the batch has one adapter, the weights of all blocks are made. The text encoders read a prompt once or
twice per picture: they are never folded. All settings that are worth it are folded, or none where their weights do not
fit beside the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.layers.folded import Blocks

ENOUGH = 4
"""Calls of the denoiser, from ``python -m benchmarks.composition --even``."""

SHARE = 0.5
"""Part of the free memory that folded weights may take."""


@dataclass(frozen=True)
class Folds:
    """What is folded in a call.

    Attributes:
        settings: of the gates.
        memory: bytes of all folded weights.
        missing: bytes that would have been needed, where there was no room for them.
    """

    settings: tuple[Blocks, ...] = ()
    memory: int = 0
    missing: int = 0


def folds(calls: Sequence[Blocks], each: int, free: int) -> Folds:
    """What is worth being folded.

    Args:
        calls: the gates in every call of the denoiser.
        each: bytes of the weights of one block; 0 = no layer can be folded.
        free: bytes of memory to be had.
    """
    counts = Counter(calls)
    worth = tuple(blocks for blocks, count in counts.items() if count >= ENOUGH and any(map(any, blocks)))
    memory = each * sum(map(len, worth))
    if memory == 0:
        return Folds()
    return Folds(worth, memory) if memory <= SHARE * free else Folds(missing=memory)
