"""Perfect and spoilt pointmaps of rendered rooms: what a network would say if it knew, or half knew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assets.build.scenes3d import PRETRAINING, Views, sample_views
from pipelines.geometry.inference import Predictions
from pipelines.geometry.pairs import make_pairs


@dataclass
class Room:
    """A rendered room: its views, and the pointmaps of all ordered pairs."""

    views: Views
    predictions: Predictions
    good: Tensor
    """``(2, E, P)``: pixels that were left as they are."""

    @property
    def poses(self) -> Tensor:
        return self.views.pose[0]

    @property
    def focals(self) -> Tensor:
        return self.views.focal[0]

    def world(self) -> Tensor:
        """True points ``(N, P, 3)``."""
        return self.views.points()[0].flatten(1, 2)


def room(seed: int, views: int = 6, size: int = 24, spread: float = 90.0, confidence: float = 6.0) -> Room:
    """Exact pointmaps, each pair in a scale of its own."""
    from dataclasses import replace

    generator = torch.Generator().manual_seed(seed)
    _, seen = sample_views(1, views, replace(PRETRAINING, spread=spread), generator, size=size)
    world, pairs = seen.points()[0].flatten(1, 2), make_pairs(views)
    inverse = torch.linalg.inv(seen.pose[0])
    points: list[list[Tensor]] = [[], []]
    for i, j in pairs:
        scale = 0.5 + torch.rand(1, generator=generator)
        for side, n in enumerate((i, j)):
            points[side].append(scale * (world[n] @ inverse[i, :3, :3].T + inverse[i, :3, 3]))
    shape = (len(pairs), size * size)
    sure = [confidence + 2 * torch.rand(shape, generator=generator) for _ in range(2)]
    made = Predictions(
        ((size, size),) * views, tuple(pairs), torch.stack(points[0]), torch.stack(points[1]), sure[0], sure[1], views
    )
    return Room(seen, made, torch.ones(2, *shape, dtype=torch.bool))


def overlap(made: Room) -> dict[tuple[int, int], float]:
    """Per unordered pair, the share of the pixels of both pictures that the other one sees too."""
    world, depth = made.world(), made.views.depth[0].flatten(1)
    height, width = made.views.depth.shape[-2:]
    share = {}
    for i, j in made.predictions.pairs:
        inverse = torch.linalg.inv(made.poses[j])
        own = world[i] @ inverse[:3, :3].T + inverse[:3, 3]
        place = own[:, :2] / own[:, 2:].clamp_min(1e-6) * made.focals[j] + torch.tensor([width / 2, height / 2])
        u, v = place.round().long().unbind(-1)
        inside = (own[:, 2] > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        seen = depth[j, (v * width + u).clamp(0, height * width - 1)]
        share[i, j] = float((inside & ((own[:, 2] - seen).abs() < 0.1 * seen)).double().mean())
    return {(i, j): (share[i, j] + share[j, i]) / 2 for i, j in share if i < j}


def spoil_narrow(clean: Room, seed: int, least: float = 0.5) -> Room:
    """:func:`spoil` the pairs with less overlap than ``least``."""
    return spoil(clean, seed, {pair for pair, share in overlap(clean).items() if share < least})


def spoil_wide(clean: Room, seed: int, degrees: float = 40) -> Room:
    """:func:`spoil` the pairs that are more than so many degrees of azimuth apart."""
    azimuth = clean.views.azimuth[0]
    return spoil(clean, seed, {(i, j) for i, j in clean.predictions.pairs if (azimuth[i] - azimuth[j]).abs() > degrees})


def spoil(
    clean: Room, seed: int, pairs: set[tuple[int, int]], degrees: tuple[float, float] = (6, 20), outliers: float = 0.07
) -> Room:
    """Turn and rescale the second view of some pairs, scatter some pixels, and stay confident about it."""
    from dataclasses import replace

    generator = torch.Generator().manual_seed(1000 + seed)
    p = clean.predictions
    second, first = p.points2.clone(), p.points1.clone()
    good = clean.good.clone()
    for edge, (i, j) in enumerate(p.pairs):
        if (i, j) in pairs or (j, i) in pairs:
            angle = torch.rand(1, generator=generator) * (degrees[1] - degrees[0]) + degrees[0]
            axis = torch.nn.functional.normalize(torch.randn(3, generator=generator), dim=0)
            x, y, z = (axis * torch.deg2rad(angle)).tolist()
            turn = torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]]))
            size = torch.exp((torch.rand(1, generator=generator) - 0.5) * 0.4)
            second[edge] = size * (second[edge] @ turn.T)
            good[1, edge] = False
    for side, points in enumerate((first, second)):
        hit = torch.rand(points.shape[:2], generator=generator) < outliers
        noise = torch.randn(points.shape, generator=generator) * 0.3 * points.norm(dim=-1, keepdim=True)
        points[hit] += noise[hit]
        good[side][hit] = False
    return Room(clean.views, replace(p, points1=first, points2=second), good)
