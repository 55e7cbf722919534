"""Initialisation of global alignment: pointmaps chained along a maximum spanning tree of the pair graph.

"DUSt3R: Geometric 3D Vision Made Easy" (arXiv 2312.14132), section 3.4. Edges score mean(C1) * mean(C2). The first
camera of the best edge is the world; further images are attached through the pointmap of an image placed before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.errors import InputError
from pipelines.geometry import cameras
from pipelines.geometry.cameras import Similarity
from pipelines.geometry.inference import Predictions
from pipelines.geometry.pairs import components

BASE_SCALE = 0.5
"""Geometric mean of the pairs' scales in the world; if it were free, everything could shrink to a point."""


@dataclass
class Start:
    """Cameras and depth before optimisation.

    Shapes: poses ``(N, 4, 4)``, focals ``(N,)``, depth ``(N, P)``; scale ``(E,)``, rotation ``(E, 3, 3)`` and shift
    ``(E, 3)`` of one similarity per edge, from the pair's frame to the world.
    """

    poses: Tensor
    focals: Tensor
    depth: Tensor
    scale: Tensor
    rotation: Tensor
    shift: Tensor


def scores(predictions: Predictions) -> Tensor:
    """mean(C1) * mean(C2) of every edge: ``(E,)``."""
    means = []
    for confidence in (predictions.confidence1, predictions.confidence2):
        real = confidence > 0
        means.append(torch.where(real, confidence, 0).sum(1) / real.sum(1).clamp_min(1))
    return means[0] * means[1]


def best_edges(predictions: Predictions) -> dict[int, int]:
    """For each image, the edge with the best score in which it comes first."""
    best: dict[int, int] = {}
    score = scores(predictions)
    for edge, (i, _) in enumerate(predictions.pairs):
        if i not in best or score[edge] > score[best[i]]:
            best[i] = edge
    return best


def own_focals(predictions: Predictions) -> Tensor:
    """Focals ``(N,)``: Weiszfeld on each image's best pointmap in its own frame.

    Raises:
        InputError: an image comes first in no pair, so its focal length cannot be estimated.
    """
    best = best_edges(predictions)
    missing = [n for n in range(len(predictions.sizes)) if n not in best]
    if missing:
        raise InputError(f"Image(s) {missing} come first in no pair: use symmetric pairs.")
    return torch.tensor([cameras.focal_length(predictions.map1(best[n])[0]) for n in range(len(predictions.sizes))])


def _tree(predictions: Predictions) -> list[int]:
    """Edges of the maximum spanning tree in the order in which they attach images; each in its direction that scores
    higher."""
    count = len(predictions.sizes)
    groups = components(count, list(predictions.pairs))
    if len(groups) > 1:
        raise InputError(f"The pairs leave the images in {len(groups)} groups without a connection: {groups}.")
    score = scores(predictions).tolist()
    order = sorted(range(len(predictions.pairs)), key=lambda e: (-score[e], predictions.pairs[e]))
    placed = set(predictions.pairs[order[0]])
    tree = [order[0]]
    while len(placed) < count:
        edge = next(e for e in order if len(placed & set(predictions.pairs[e])) == 1)
        placed |= set(predictions.pairs[edge])
        tree.append(edge)
    return tree


def spanning_tree_start(predictions: Predictions, threshold: float = 3.0, focals: Tensor | None = None) -> Start:
    """Initial cameras, depth and similarities of all images.

    Args:
        threshold: raw confidence above which a pixel counts for PnP.
        focals: known focal lengths ``(N,)``; None = estimated.

    Raises:
        InputError: the pair graph is not connected, or an image comes first in no pair.
    """
    count = len(predictions.sizes)
    focals = own_focals(predictions) if focals is None else focals.float()
    tree = _tree(predictions)
    world: list[Tensor | None] = [None] * count
    poses: list[Tensor | None] = [None] * count
    i, j = predictions.pairs[tree[0]]
    world[i], world[j] = predictions.points1[tree[0]], predictions.points2[tree[0]]
    poses[i] = torch.eye(4)
    for edge in tree[1:]:
        i, j = predictions.pairs[edge]
        first, second = predictions.points1[edge], predictions.points2[edge]
        known, weight = (i, predictions.confidence1) if world[i] is not None else (j, predictions.confidence2)
        move = cameras.nearest_similarity(first if known == i else second, world[known], weight[edge])  # type: ignore[arg-type]
        if poses[i] is None:
            poses[i] = move.pose(torch.eye(4))
        if known == i:
            world[j] = move(second)
        else:
            world[i] = move(first)
    confidence = strongest(predictions)
    for n in range(count):
        poses[n] = (
            poses[n] if poses[n] is not None else _by_pnp(predictions, n, world[n], confidence[n], focals, threshold)
        )
    placed = torch.stack([points for points in world if points is not None])
    pose = torch.stack([p for p in poses if p is not None])
    return _normalised(predictions, placed, pose, focals)


def strongest(predictions: Predictions) -> Tensor:
    """The largest confidence of every pixel over all edges, as first or second view: ``(N, P)``."""
    out = torch.zeros(len(predictions.sizes), predictions.confidence1.shape[1])
    for (i, j), first, second in zip(predictions.pairs, predictions.confidence1, predictions.confidence2, strict=True):
        out[i] = torch.maximum(out[i], first.cpu())
        out[j] = torch.maximum(out[j], second.cpu())
    return out


def _by_pnp(
    predictions: Predictions, n: int, points: Tensor | None, confidence: Tensor, focals: Tensor, threshold: float
) -> Tensor:
    size = predictions.sizes[n]
    pixels = size[0] * size[1]
    sure = confidence[:pixels] > threshold
    if sure.sum() < 4:  # too few: use the more confident half
        sure = confidence[:pixels] >= confidence[:pixels].median()
    assert points is not None
    found = cameras.solve_pnp(points[:pixels].unflatten(0, size), sure.unflatten(0, size), float(focals[n]), rounds=10)
    return found[0] if found else torch.eye(4)


def _normalised(predictions: Predictions, world: Tensor, poses: Tensor, focals: Tensor) -> Start:
    first = torch.tensor([i for i, _ in predictions.pairs])
    moves = cameras.nearest_similarity(predictions.points1, world[first], predictions.confidence1)
    scale = moves.scale.clamp_min(1e-6)
    factor = BASE_SCALE / scale.log().mean().exp()
    poses = poses.clone()
    poses[:, :3, 3] *= factor
    own = (world * factor - poses[:, None, :3, 3]) @ poses[:, :3, :3]
    depth = own[..., 2].clamp_min(1e-4)
    moved = Similarity(scale * factor, moves.rotation, moves.shift * factor)
    return Start(poses, focals, depth, moved.scale, moved.rotation, moved.shift)
