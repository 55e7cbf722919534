"""Verification of pairs: two pictures must agree in colour where the pair's points coincide.

A pointmap network also predicts points for pictures that show nothing in common, often just as confidently: it merges
two corners of a room into one. Its confidence separates such pairs poorly, and they are consistent with each other. The
colours are independent evidence. For an ordered pair (i, j), the points of j are projected into i; where they lie on
the surface that i sees there, both pictures should show the same point, and

    agreement(i, j) = correlation of the colours over these pixels, with each channel's mean subtracted,

which is invariant to exposure and contrast. Not from a paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.geometry.images import Photo
from pipelines.geometry.inference import Predictions
from pipelines.geometry.initialise import own_focals
from pipelines.geometry.pairs import Pair, components

LEAST = 0.6
"""Agreement from which a pair is accepted. On unseen rendered rooms 98 % of the correct pairs reach it, and 2 % of the
wrong ones in one of their orders (``benchmarks/results/lora3d.md``)."""
SAME_SURFACE = 0.1
"""Points that differ in depth by less than this share are taken to be on the same surface."""
FEWEST = 32
"""With fewer common pixels than this, the agreement is 0."""


def agreement(predictions: Predictions, photos: Sequence[Photo]) -> Tensor:
    """Colour agreement of every ordered pair ``(E,)``, from -1 to 1; 0 if fewer than :data:`FEWEST` points coincide."""
    focals = own_focals(predictions)
    return torch.tensor([_edge(predictions, photos, edge, float(focals[i])) for edge, (i, _) in
                         enumerate(predictions.pairs)])  # fmt: skip


def _edge(predictions: Predictions, photos: Sequence[Photo], edge: int, focal: float) -> float:
    first, second = (photos[n].pixels for n in predictions.pairs[edge])
    surface, points = predictions.map1(edge)[0], predictions.map2(edge)[0].flatten(0, 1)
    height, width = surface.shape[:2]
    depth = points[:, 2]
    place = points[:, :2] / depth[:, None].clamp_min(1e-6) * focal + points.new_tensor([width / 2, height / 2])
    u, v = place.round().nan_to_num().clamp(-1, max(height, width)).long().unbind(-1)
    inside = (depth > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    u, v = u.clamp(0, width - 1), v.clamp(0, height - 1)
    meets = (inside & ((surface[v, u, 2] - depth).abs() < SAME_SURFACE * depth)).cpu()
    if meets.sum() < FEWEST:
        return 0.0
    u, v = u.cpu()[meets], v.cpu()[meets]
    return correlation(first[:, v, u], second.flatten(1)[:, meets])


def correlation(a: Tensor, b: Tensor) -> float:
    """Correlation of two sets of colours ``(3, M)`` over all three channels together; 0 if one of them is constant."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    size = a.norm() * b.norm()
    return float((a * b).sum() / size) if size > 1e-6 else 0.0


def believed(pairs: Sequence[Pair], count: int, agrees: Tensor, least: float = LEAST) -> list[int]:
    """Edges whose agreement, the lower of both orders, reaches ``least``.

    If these leave the images in several groups, the best of the other pairs are added to connect them.
    """
    lower = _lower_of_both_orders(pairs, agrees)
    best_first = sorted(range(len(pairs)), key=lambda edge: (-lower[edge], pairs[edge]))
    kept: list[int] = []
    for edge in best_first:
        if lower[edge] >= least or _joins(count, [pairs[e] for e in kept], pairs[edge]):
            kept.append(edge)
    reached = {frozenset(pairs[edge]) for edge in kept}
    return [edge for edge, pair in enumerate(pairs) if frozenset(pair) in reached]


def _lower_of_both_orders(pairs: Sequence[Pair], agrees: Tensor) -> list[float]:
    lower: dict[frozenset[int], float] = {}
    for pair, value in zip(pairs, agrees.tolist(), strict=True):
        lower[frozenset(pair)] = min(value, lower.get(frozenset(pair), 1.0))
    return [lower[frozenset(pair)] for pair in pairs]


def _joins(count: int, kept: list[Pair], pair: Pair) -> bool:
    return len(components(count, [*kept, pair])) < len(components(count, kept))


@dataclass(frozen=True)
class Verified:
    """The accepted pairs.

    Attributes:
        predictions: of these pairs, and of doubtful ones where nothing else connects the pictures.
        groups: pictures connected by accepted pairs; the relative position of two groups is doubtful.
        warnings: on pairs left out and groups, one sentence each.
    """

    predictions: Predictions
    groups: list[list[int]]
    warnings: list[str]

    def within(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs whose pictures are in one group."""
        group = {n: number for number, members in enumerate(self.groups) for n in members}
        return [(i, j) for i, j in pairs if group[i] == group[j]]


def verified(predictions: Predictions, photos: Sequence[Photo], least: float = LEAST) -> Verified:
    """Verify all pairs of three or more pictures; ``least`` is the agreement that is needed."""
    pairs = predictions.pairs
    agrees = agreement(predictions, photos)
    kept = believed(pairs, len(photos), agrees, least)
    lower = _lower_of_both_orders(pairs, agrees)
    groups = components(len(photos), [pairs[edge] for edge in kept if lower[edge] >= least])
    warnings = []
    if len(kept) < len(pairs):
        warnings.append(f"{len(pairs) - len(kept)} of {len(pairs)} pairs are left out: their pictures differ in colour "
                        "where their points coincide.")  # fmt: skip
    if len(groups) > 1:
        parts = " | ".join(" ".join(str(n) for n in sorted(group)) for group in groups)
        warnings.append(f"Only doubtful pairs connect these groups of pictures: {parts}. Take pictures in between.")
    return Verified(predictions.select(kept), groups, warnings)
