"""Who has what: rows divided among simulated clients, as pure functions of labels and a seed.

Every client gets at least one row to train on. Skews by label are those of FFA-LoRA (fixed shares, 'mild' and
'severe') and of LoRA-FAIR (Dirichlet).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from random import Random

from adapters.errors import InputError

MOSTLY = {"mild": 0.85, "severe": 0.95}
"""Share of a label's rows that its own client gets."""


def even(count: int, clients: int, random: Random) -> list[list[int]]:
    """Rows at random, as many for every client as possible."""
    order = list(range(count))
    random.shuffle(order)
    return [sorted(order[client::clients]) for client in range(clients)]


def by_value(values: Sequence[Hashable]) -> dict[str, list[int]]:
    """A client for each value, in order of the values."""
    found: dict[str, list[int]] = {}
    for number, value in enumerate(values):
        found.setdefault(str(value), []).append(number)
    return dict(sorted(found.items()))


def dirichlet(labels: Sequence[Hashable], clients: int, concentration: float, random: Random) -> list[list[int]]:
    """Each label's rows in shares drawn from a Dirichlet distribution (normalised gamma numbers)."""
    parts: list[list[int]] = [[] for _ in range(clients)]
    for rows in by_value(labels).values():
        shares = [random.gammavariate(concentration, 1.0) for _ in range(clients)]
        _deal(rows, shares, parts, random)
    return [sorted(part) for part in parts]


def mostly(labels: Sequence[Hashable], clients: int, share: float, random: Random) -> list[list[int]]:
    """Label number l belongs to client l mod ``clients``, which gets ``share`` of its rows, the others the rest."""
    parts: list[list[int]] = [[] for _ in range(clients)]
    for number, rows in enumerate(by_value(labels).values()):
        rest = (1 - share) / max(1, clients - 1)
        shares = [share if client == number % clients else rest for client in range(clients)]
        _deal(rows, shares, parts, random)
    return [sorted(part) for part in parts]


def _deal(rows: Sequence[int], shares: Sequence[float], parts: list[list[int]], random: Random) -> None:
    """Deal shuffled ``rows`` in proportion to ``shares``."""
    order, total, start, reached = list(rows), sum(shares), 0, 0.0
    random.shuffle(order)
    for client, share in enumerate(shares):
        reached += share
        stop = len(order) if client == len(shares) - 1 else round(len(order) * reached / total)
        parts[client] += order[start:stop]
        start = stop


def held_out(rows: Sequence[int], share: float, random: Random) -> tuple[list[int], list[int]]:
    """(rows to train on, rows to measure on)."""
    order = list(rows)
    random.shuffle(order)
    count = min(round(len(order) * share), len(order) - 1)
    return sorted(order[count:]), sorted(order[:count])


def held_out_groups(groups: Sequence[Hashable], share: float, random: Random) -> set[Hashable]:
    """Values of which all rows are measured on, the same for every client."""
    values = sorted(set(groups), key=str)
    random.shuffle(values)
    return set(values[: round(len(values) * share)])


def check(names: Sequence[str], parts: Sequence[Sequence[int]]) -> None:
    """Refuse a partition that leaves a client without rows to train on."""
    empty = [name for name, part in zip(names, parts, strict=True) if not part]
    if empty:
        raise InputError(
            f"The client '{empty[0]}' has no rows to train on: take fewer clients, more rows, a smaller test_share or "
            "a more even partition."
        )


def table(labels: Sequence[Hashable], parts: Sequence[Sequence[int]]) -> list[Counter[str]]:
    """Of each client, how many rows it has of each label."""
    return [Counter(str(labels[number]) for number in part) for part in parts]
