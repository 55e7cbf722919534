"""Accuracy of a reconstruction.

ATE: RMSE of camera centres after the best Sim(3). RPE: errors of the motion between views. RRA, RTA: shares of pairs
whose relative rotation and direction of translation have an error below an angle; mAA: area under the curve of pairs
for which both do. AFE: mean absolute focal error. Poses are camera-to-world.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters.errors import InputError
from pipelines.geometry.cameras import Similarity, rotation_angle, umeyama


def onto_truth(poses: Tensor, truth: Tensor) -> Similarity:
    """The Sim(3) that maps estimated camera centres to the true ones.

    Raises:
        InputError: fewer than three cameras, or all on one line, which leave the Sim(3) undetermined.
    """
    centres = truth[:, :3, 3].double()
    spread = torch.linalg.svdvals(centres - centres.mean(0)) if len(centres) > 1 else centres.new_zeros(3)
    if len(centres) < 3 or spread[1] < 1e-6 * max(float(spread[0]), 1e-12):
        raise InputError("The trajectory error needs three or more cameras that are not all on one line.")
    return umeyama(poses[:, :3, 3].double(), centres)


def trajectory_error(poses: Tensor, truth: Tensor) -> float:
    """ATE in the units of ``truth``."""
    move = onto_truth(poses, truth)
    apart = move(poses[None, :, :3, 3].double())[0] - truth[:, :3, 3].double()
    return float(apart.square().sum(-1).mean().sqrt())


def relative_pose_error(poses: Tensor, truth: Tensor, delta: int = 1) -> tuple[float, float]:
    """RPE: RMSE of the translation and mean angle in degrees of the motion over ``delta`` views."""
    scale = onto_truth(poses, truth).scale
    poses, truth = poses.double().clone(), truth.double()
    poses[:, :3, 3] *= scale
    made = torch.linalg.inv(poses[:-delta]) @ poses[delta:]
    true = torch.linalg.inv(truth[:-delta]) @ truth[delta:]
    error = torch.linalg.inv(true) @ made
    angle = rotation_angle(torch.eye(3, dtype=torch.float64).expand(len(error), 3, 3), error[:, :3, :3])
    return float(error[:, :3, 3].square().sum(-1).mean().sqrt()), float(angle.mean())


def relative_angles(poses: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Errors in degrees of the relative rotation and of the direction of translation of every pair (i < j)."""
    i, j = torch.triu_indices(len(poses), len(poses), 1)
    made, true = (torch.linalg.inv(p.double()[i]) @ p.double()[j] for p in (poses, truth))
    turn = rotation_angle(made[:, :3, :3], true[:, :3, :3])
    a, b = (torch.nn.functional.normalize(m[:, :3, 3], dim=-1) for m in (made, true))
    return turn, torch.rad2deg(2 * torch.asin(((a - b).norm(dim=-1) / 2).clamp(max=1)))


def pose_accuracy(poses: Tensor, truth: Tensor, degrees: float = 15, top: int = 30) -> dict[str, float]:
    """RRA and RTA at ``degrees``, and mAA up to ``top`` degrees, as shares from 0 to 1."""
    turn, way = relative_angles(poses, truth)
    both = torch.maximum(turn, way)
    area = float(np.mean([float((both < t).double().mean()) for t in range(1, top + 1)]))
    return {"rra": float((turn < degrees).double().mean()), "rta": float((way < degrees).double().mean()), "maa": area}


def focal_error(focals: Tensor, truth: Tensor) -> tuple[float, float]:
    """Mean absolute focal error in pixels and in per cent."""
    error = (focals.double() - truth.double()).abs()
    return float(error.mean()), float((error / truth.double()).mean() * 100)


def pair_error(predicted: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    """Mean distance of both views' points ``(H, W, 3)`` in camera 1, after one scalar scale, in the truth's units.

    The scale is the median of <truth, predicted> / <predicted, predicted>.
    """
    made = torch.cat([x.reshape(-1, 3) for x in predicted]).double()
    true = torch.cat([x.reshape(-1, 3) for x in truth]).double()
    scale = ((true * made).sum(-1) / (made * made).sum(-1).clamp_min(1e-12)).median()
    return float((scale * made - true).norm(dim=-1).mean())


def cloud_distances(points: Tensor, truth: Tensor) -> dict[str, float]:
    """Accuracy (estimate to truth), completeness (truth to estimate), mean and median, and their chamfer mean."""
    from scipy.spatial import cKDTree

    a, b = points.double().numpy(), truth.double().numpy()
    there, back = cKDTree(b).query(a)[0], cKDTree(a).query(b)[0]
    return {
        "accuracy": float(there.mean()), "accuracy_median": float(np.median(there)),
        "completeness": float(back.mean()), "completeness_median": float(np.median(back)),
        "chamfer": float((there.mean() + back.mean()) / 2),
    }  # fmt: skip


@dataclass(frozen=True)
class DepthErrors:
    """Errors of a depth map scaled to the median of the truth (see :func:`depth_errors`)."""

    abs_rel: float
    rmse: float
    delta: float


def depth_errors(depth: Tensor, truth: Tensor) -> DepthErrors:
    """Errors of one depth map ``(H, W)``: mean relative error, RMSE, and delta, the share of pixels within a factor
    1.25."""
    depth = depth * (truth.median() / depth.median())
    ratio = torch.maximum(depth / truth, truth / depth)
    return DepthErrors(
        float(((depth - truth).abs() / truth).mean()), float((depth - truth).square().mean().sqrt()),
        float((ratio < 1.25).double().mean()),
    )  # fmt: skip


def ranking(score: Tensor, good: Tensor) -> float:
    """ROC-AUC: how often a good pixel scores higher than a bad one (ties count half)."""
    from scipy.stats import rankdata

    ranks = rankdata(score.double().numpy().ravel())
    chosen = good.numpy().ravel().astype(bool)
    positives, negatives = chosen.sum(), (~chosen).sum()
    if positives == 0 or negatives == 0:
        raise InputError("The ROC-AUC needs both good and bad pixels.")
    return float((ranks[chosen].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def confidence_quality(confidence: Tensor, error: Tensor) -> dict[str, float]:
    """Spearman correlation of confidence with -error, and AUSE: the area between sparsification curves, scaled."""
    from scipy.stats import spearmanr

    confidence, error = confidence.double().flatten(), error.double().flatten()
    curves = []
    for key in (confidence, -error):
        kept = error[key.argsort(descending=True)].cumsum(0) / torch.arange(1, len(error) + 1)
        curves.append(kept / error.mean())
    return {"spearman": float(spearmanr(confidence.numpy(), -error.numpy()).statistic),
            "ause": float((curves[0] - curves[1]).mean())}  # fmt: skip
