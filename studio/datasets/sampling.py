"""The order in which pictures are shown: a function of (seed, position), so nothing needs to be stored.

An epoch shows every picture ``repeats`` times. Pictures of a batch share a bucket; the last batch of a bucket is
topped up with other pictures of that bucket, so that every batch is full.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from studio.datasets.buckets import Size

T = TypeVar("T")


def epoch_batches(buckets: Sequence[Size], batch_size: int, repeats: int, rng: random.Random) -> list[list[int]]:
    """Batches of picture numbers for one epoch; ``buckets[i]`` is the bucket of picture i.

    With a single bucket the batches stay in the order drawn, so that four batches of 8 are one batch of 32.
    """
    members: dict[Size, list[int]] = {}
    for picture, bucket in enumerate(buckets):
        members.setdefault(bucket, []).append(picture)
    batches: list[list[int]] = []
    for bucket in sorted(members):
        order = _shuffled(members[bucket] * repeats, rng)
        while len(order) % batch_size:
            order += _shuffled(members[bucket], rng)[: batch_size - len(order) % batch_size]
        batches += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return batches if len(members) == 1 else _shuffled(batches, rng)


def batches_per_epoch(buckets: Sequence[Size], batch_size: int, repeats: int) -> int:
    """The number of batches that :func:`epoch_batches` makes."""
    return sum(-(-count * repeats // batch_size) for count in Counter(buckets).values())


def _shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    order = list(items)
    rng.shuffle(order)
    return order
