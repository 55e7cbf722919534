"""Global alignment: cameras, depth maps and one similarity per pair that explain all pointmaps at once.

"DUSt3R: Geometric 3D Vision Made Easy" (arXiv 2312.14132), section 3.4. With chi_n = T_n D_n K_n^-1 p the world points
of image n and (s_e, P_e) the similarity of edge e = (i, j),

    minimise  sum over e, v in {i, j}, p  of  w_e,v,p || chi_v,p - s_e P_e X_e,v,p ||,     w = log C,

by Adam, with the mean log s_e fixed. Two images need no optimisation (:func:`view_pair`). ``reweight`` makes the
alignment robust, as in LoRA3D (:mod:`pipelines.geometry.calibration`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from adapters.errors import InputError
from adapters.progress import Monitor, Progress, Silent, check
from pipelines.geometry import cameras
from pipelines.geometry.cameras import Similarity
from pipelines.geometry.inference import Predictions
from pipelines.geometry.initialise import BASE_SCALE, own_focals, scores, spanning_tree_start, strongest

Transform = Literal["log", "sqrt", "minus_one", "identity"]
Reweight = Callable[[int, Tensor, Tensor], Tensor | None]
"""(step, confidence C ``(2, E, P)``, distances e ``(2, E, P)``) -> new weights, or None to keep the current ones."""

FOCAL_SLOWNESS = 20.0
"""The log focals are optimised times this factor, which slows them down."""


@dataclass
class Alignment:
    """Result of :func:`align` and :func:`view_pair`.

    Shapes: poses ``(N, 4, 4)`` camera-to-world; focals ``(N,)`` in pixels; depth, confidence ``(N, P)``; weights (of
    the transformed confidence), distances ``(2, E, P)`` (view 1, view 2). ``pair_moves`` maps each pair's frame to the
    world.
    """

    sizes: tuple[tuple[int, int], ...]
    poses: Tensor
    focals: Tensor
    depth: Tensor
    confidence: Tensor
    weights: Tensor
    distances: Tensor
    pair_moves: Similarity
    losses: list[float] = field(default_factory=list)

    def depth_map(self, n: int) -> Tensor:
        """Depth ``(H, W)`` of an image."""
        h, w = self.sizes[n]
        return self.depth[n, : h * w].unflatten(0, (h, w))

    def confidence_map(self, n: int) -> Tensor:
        """Confidence ``(H, W)`` of an image: the network's own, the largest over all edges."""
        h, w = self.sizes[n]
        return self.confidence[n, : h * w].unflatten(0, (h, w))

    def points(self, n: int) -> Tensor:
        """World points ``(H, W, 3)`` of an image."""
        own = cameras.unproject(self.depth_map(n), float(self.focals[n]))
        return own @ self.poses[n, :3, :3].T + self.poses[n, :3, 3]

    def moved(self, move: Similarity) -> Alignment:
        """The scene moved by a similarity."""
        return replace(self, poses=move.pose(self.poses), depth=self.depth * move.scale)


def transformed(confidence: Tensor, kind: Transform = "log") -> Tensor:
    """Weights of the alignment from raw confidence; 0 stays 0 (padding)."""
    real = confidence > 0
    safe = torch.where(real, confidence, 1.0)
    value = {
        "log": torch.log, "sqrt": torch.sqrt, "minus_one": lambda c: c - 1, "identity": lambda c: c,
    }[kind](safe)  # fmt: skip
    return torch.where(real, value, 0.0)


def learning_rate(
    step: int, steps: int, peak: float, schedule: Literal["cosine", "linear"], floor: float = 1e-6
) -> float:
    """Learning rate of step ``step`` (from 0) of ``steps``."""
    t = step / steps
    if schedule == "linear":
        return peak + (floor - peak) * t
    return floor + (peak - floor) * (1 + math.cos(t * math.pi)) / 2


def _log1p(x: Tensor) -> Tensor:
    return x.sign() * x.abs().log1p()


def _expm1(x: Tensor) -> Tensor:
    return x.sign() * x.abs().expm1()


class _Variables:
    """The variables optimised by Adam, and cameras and points from them."""

    def __init__(self, predictions: Predictions, poses: Tensor | None, focals: Tensor | None, threshold: float) -> None:
        start = spanning_tree_start(predictions.to("cpu"), threshold, focals)
        if poses is not None:
            _onto_known(start, poses)
        device = predictions.points1.device
        self.pair_turn = cameras.matrix_quaternion(start.rotation).to(device)
        self.pair_scale = start.scale.log().to(device)
        self.pair_shift = _log1p(start.shift / start.scale[:, None]).to(device)
        self.turn = cameras.matrix_quaternion(start.poses[:, :3, :3]).to(device)
        self.shift = _log1p(start.poses[:, :3, 3]).to(device)
        self.log_depth = start.depth.log().to(device)
        self.log_focal = (start.focals.log() * FOCAL_SLOWNESS).to(device)
        self.pinned = poses is None or len(poses) < 2
        self.free = [self.pair_turn, self.pair_scale, self.pair_shift, self.log_depth]
        self.free += [] if focals is not None else [self.log_focal]
        self.free += [] if poses is not None else [self.turn, self.shift]
        for variable in self.free:
            variable.requires_grad_()
        first = predictions.sizes[0]
        if all(size == first for size in predictions.sizes):
            rays = cameras.pixels(*first, device=device)[None]
        else:
            rays = torch.zeros(len(predictions.sizes), predictions.points1.shape[1], 2, device=device)
            for n, size in enumerate(predictions.sizes):
                rays[n, : size[0] * size[1]] = cameras.pixels(*size, device=device)
        self.rays = rays

    def focals(self) -> Tensor:
        return (self.log_focal / FOCAL_SLOWNESS).exp()

    def depth(self) -> Tensor:
        return self.log_depth.exp()

    def poses(self) -> Tensor:
        out = torch.eye(4, device=self.turn.device).repeat(len(self.turn), 1, 1)
        out[:, :3, :3], out[:, :3, 3] = cameras.quaternion_matrix(self.turn), _expm1(self.shift)
        return out

    def moves(self) -> Similarity:
        log = self.pair_scale
        if self.pinned:
            log = log + (math.log(BASE_SCALE) - log.mean())
        scale = log.exp()
        return Similarity(scale, cameras.quaternion_matrix(self.pair_turn), scale[:, None] * _expm1(self.pair_shift))

    def world(self) -> Tensor:
        """World points ``(N, P, 3)``."""
        depth = self.depth()[..., None]
        own = torch.cat([self.rays * depth / self.focals()[:, None, None], depth], -1)
        return own @ cameras.quaternion_matrix(self.turn).mT + _expm1(self.shift)[:, None]


def _onto_known(start: object, poses: Tensor) -> None:
    """Move a start onto known cameras."""
    from pipelines.geometry.initialise import Start

    assert isinstance(start, Start)
    before, after = start.poses[:, :3, 3], poses[:, :3, 3].to(start.poses)
    move = cameras.umeyama(before, after) if len(poses) > 2 else Similarity(
        torch.tensor(1.0), poses[0, :3, :3] @ start.poses[0, :3, :3].T,
        poses[0, :3, 3] - poses[0, :3, :3] @ start.poses[0, :3, :3].T @ start.poses[0, :3, 3],
    )  # fmt: skip
    start.poses = poses.to(start.poses)
    start.depth = start.depth * move.scale
    start.shift = move.scale * start.shift @ move.rotation.T + move.shift
    start.rotation = move.rotation @ start.rotation
    start.scale = start.scale * move.scale


def align(
    predictions: Predictions, steps: int = 300, lr: float = 0.01, schedule: Literal["cosine", "linear"] = "cosine",
    transform: Transform = "log", reweight: Reweight | None = None, poses: Tensor | None = None,
    focals: Tensor | None = None, threshold: float = 3.0, squared: bool = False, monitor: Monitor | None = None,
) -> Alignment:  # fmt: skip
    """Align three or more images.

    Args:
        predictions: of ordered pairs that connect all images.
        steps, lr, schedule: of Adam.
        transform: from raw confidence to weights; the paper's is log.
        reweight: called before every step and once after the last for new weights; without it they stay transformed C.
        poses, focals: known cameras ``(N, 4, 4)`` and ``(N,)``, which are kept fixed.
        threshold: raw confidence above which pixels count for PnP in the initialisation.
        squared: minimise squared distances ("l2") instead of distances.
        monitor: receives progress and may cancel.

    Raises:
        InputError: fewer than three images, a pair graph that is not connected, or a loss that is not finite.
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    if len(predictions.sizes) < 3:
        raise InputError(f"Global alignment needs three or more images, got {len(predictions.sizes)}; see view_pair.")
    monitor = monitor or Silent()
    monitor.report(Progress("align", 0, steps))
    variables = _Variables(predictions, poses, focals, threshold)
    optimizer = torch.optim.Adam(variables.free, lr=lr, betas=(0.9, 0.9))
    device = predictions.points1.device
    index = [torch.tensor([pair[side] for pair in predictions.pairs], device=device) for side in (0, 1)]
    views = (predictions.points1, predictions.points2)
    raw = torch.stack([predictions.confidence1, predictions.confidence2])
    start = transformed(raw, transform)
    weights = start
    total = (raw > 0).sum((1, 2)).clamp_min(1)

    def distances() -> Tensor:
        world, move = variables.world(), variables.moves()
        # index_select instead of world[n]: its gradient is several times faster on CPU
        apart = [world.index_select(0, n) - move(x) for n, x in zip(index, views, strict=True)]
        square = torch.stack([(d * d).sum(-1) for d in apart])
        return square if squared else (square + 1e-18).sqrt()

    losses = []
    for step in range(steps):
        check(monitor)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, schedule)
        apart = distances()
        if reweight is not None:
            found = reweight(step, start, apart.detach())
            weights = weights if found is None else found
        loss = ((weights * apart).sum((1, 2)) / total).sum()
        if not loss.isfinite():
            broken = int((weights * apart).sum((0, 2)).isfinite().logical_not().long().argmax())
            raise InputError(
                f"The alignment's loss is not finite after {step} steps, first in the pair of pictures "
                f"{predictions.pairs[broken]}: leave one of them out."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 10 == 9:
            monitor.report(Progress("align", step + 1, steps, loss=losses[-1]))
    with torch.no_grad():
        apart = distances()
        if reweight is not None:
            found = reweight(steps, start, apart)
            weights = weights if found is None else found
        move = variables.moves()
        return Alignment(
            predictions.sizes, variables.poses().cpu(), variables.focals().detach().cpu(),
            variables.depth().detach().cpu(), strongest(predictions.to("cpu")), weights.cpu(), apart.cpu(),
            Similarity(move.scale.cpu(), move.rotation.cpu(), move.shift.cpu()), losses,
        )  # fmt: skip


def view_pair(predictions: Predictions, threshold: float = 3.0) -> Alignment:
    """Align two images without optimisation: focals by Weiszfeld, the relative pose by PnP.

    The world is the first camera of the more confident order.

    Raises:
        InputError: not exactly the two ordered pairs of two images, or no pose is found.
    """
    if len(predictions.sizes) != 2 or sorted(predictions.pairs) != [(0, 1), (1, 0)]:
        raise InputError("Pair alignment needs the predictions of two images in both orders.")
    focals = own_focals(predictions)
    edge = int(scores(predictions).argmax())
    base, other = predictions.pairs[edge]
    points, confidence = predictions.map2(edge)
    sure = confidence > threshold
    if sure.sum() < 4:
        sure = confidence >= confidence.median()
    found = cameras.solve_pnp(points, sure, float(focals[other]), rounds=100)
    if found is None:
        raise InputError("No relative pose of the two images was found: they may not show the same scene.")
    poses, depth = torch.eye(4).repeat(2, 1, 1), torch.zeros(2, predictions.points1.shape[1])
    poses[other] = found[0]
    own = predictions.points1[edge]
    depth[base] = own[:, 2]
    depth[other] = ((predictions.points2[edge] - found[0][:3, 3]) @ found[0][:3, :3])[:, 2]
    weights = transformed(torch.stack([predictions.confidence1, predictions.confidence2]))
    ones = Similarity(torch.ones(2), torch.eye(3).repeat(2, 1, 1), torch.zeros(2, 3))
    return Alignment(
        predictions.sizes, poses, focals, depth.clamp_min(1e-4), strongest(predictions), weights,
        torch.zeros_like(weights), ones,
    )  # fmt: skip


def clean(scene: Alignment, tolerance: float = 1e-3) -> Alignment:
    """The scene with confidence 0 where a point would occlude one seen with more confidence by another image.

    Such points are mostly wrong. ``tolerance`` is the share of the depth by which a point must be nearer.
    """
    confidence = scene.confidence.clone()
    worlds = [scene.points(n).flatten(0, 1) for n in range(len(scene.sizes))]
    for n, (h, w) in enumerate(scene.sizes):
        inverse = torch.linalg.inv(scene.poses[n])
        depth, own = scene.depth_map(n), scene.confidence_map(n)
        for m, world in enumerate(worlds):
            if m == n:
                continue
            seen = world @ inverse[:3, :3].T + inverse[:3, 3]
            place = seen[:, :2] / seen[:, 2:].clamp_min(1e-6) * scene.focals[n] + torch.tensor([w / 2, h / 2])
            u, v = place.round().long().unbind(-1)
            inside = (seen[:, 2] > 0) & (u >= 0) & (u < w) & (v >= 0) & (v < h)
            u, v = u.clamp(0, w - 1), v.clamp(0, h - 1)
            before = seen[:, 2] < (1 - tolerance) * depth[v, u]
            less = scene.confidence[m, : len(world)] < own[v, u]
            confidence[m, : len(world)][inside & before & less] = 0
    return replace(scene, confidence=confidence)
