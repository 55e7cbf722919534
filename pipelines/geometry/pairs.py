"""Graphs of ordered image pairs for the network.

"DUSt3R: Geometric 3D Vision Made Easy" (arXiv 2312.14132), section 3.4. Graphs are given as text: ``complete``,
``swin-3``, ``logwin-2`` (the last two optionally with ``-noncyclic``), ``oneref-0``.
"""

from __future__ import annotations

from adapters.errors import InputError

Pair = tuple[int, int]
MANY = 30
"""Number of images above which a complete graph must be allowed explicitly."""


def make_pairs(count: int, graph: str = "complete", symmetric: bool = True, many: bool = False) -> list[Pair]:
    """Ordered pairs of ``count`` images, in a fixed order; if ``symmetric``, every pair is also added in reverse.

    Raises:
        InputError: no such graph, a window or reference beyond the images, no image, or a complete graph over more than
            :data:`MANY` without ``many``.
    """
    if count < 1:
        raise InputError("There are no images: give at least one, preferably three or more.")
    if count == 1:
        return [(0, 0)]
    kind, _, rest = graph.partition("-")
    words = [word for word in rest.split("-") if word]
    cyclic = "noncyclic" not in words
    numbers = [word for word in words if word != "noncyclic"]
    number = _whole(numbers, graph)
    if kind == "complete" and not words:
        if count > MANY and not many:
            raise InputError(
                f"{count} images make {count * (count - 1)} ordered pairs: choose a window ('swin-3') or allow them."
            )
        pairs = [(i, j) for i in range(count) for j in range(i)]
    elif kind in ("swin", "logwin") and number != 0:
        most = count - 1 if kind == "swin" else (count - 1).bit_length()
        if number is not None and number > most:
            raise InputError(f"'{graph}': {count} images allow windows up to '{kind}-{most}'.")
        window = min(3, most) if number is None else number
        offsets = list(range(1, window + 1)) if kind == "swin" else [2**k for k in range(window)]
        pairs = _window(count, [*offsets, *(-offset for offset in offsets)], cyclic)
    elif kind == "oneref" and cyclic:
        reference = number or 0
        if reference >= count:
            raise InputError(f"'{graph}': there are {count} images, numbered from 0.")
        pairs = [(reference, j) for j in range(count) if j != reference]
    else:
        raise InputError(f"Unknown pair graph '{graph}': use complete, swin-N, logwin-N or oneref-N.")
    both = [*pairs, *((j, i) for i, j in pairs)] if symmetric else pairs
    return list(dict.fromkeys(both))


def _whole(numbers: list[str], graph: str) -> int | None:
    if not numbers:
        return None
    if len(numbers) > 1 or not numbers[0].isascii() or not numbers[0].isdigit():
        raise InputError(f"'{graph}' must end in a whole number, as in 'swin-3'.")
    return int(numbers[0])


def _window(count: int, offsets: list[int], cyclic: bool) -> list[Pair]:
    pairs = set()
    for i in range(count):
        for offset in offsets:
            j = i + offset
            if cyclic:
                j %= count
            if 0 <= j < count and i != j:
                pairs.add((min(i, j), max(i, j)))
    return sorted(pairs)


def keep_near(pairs: list[Pair], distance: int, count: int = 0) -> list[Pair]:
    """Pairs whose indices differ by at most ``distance``; with ``count``, the images are taken as a circle."""
    return [
        (i, j) for i, j in pairs if min(abs(i - j), count - abs(i - j) if count else abs(i - j)) <= distance
    ]  # fmt: skip


def components(count: int, pairs: list[Pair]) -> list[list[int]]:
    """Connected components of the ``count`` images, largest first."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, j in pairs:
        parent[root(i)] = root(j)
    groups: dict[int, list[int]] = {}
    for i in range(count):
        groups.setdefault(root(i), []).append(i)
    return sorted(groups.values(), key=len, reverse=True)
