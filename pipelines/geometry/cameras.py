"""From pointmaps to cameras: focal length, pose, similarity.

"DUSt3R: Geometric 3D Vision Made Easy" (arXiv 2312.14132), section 3.3: Weiszfeld's iteration for the focal length, PnP
with RANSAC for poses. Similarities by S. Umeyama, "Least-squares estimation of transformation parameters between two
point patterns" (PAMI 1991).

Poses are camera-to-world, 4x4, in OpenCV's axes. A pixel is its integer column and row; the principal point is
(W/2, H/2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STEEPEST = 4.0
"""Points farther off the camera's axis than the angle with this tangent do not count for the focal length."""


@dataclass(frozen=True)
class Similarity:
    """``x -> scale R x + shift``: scale ``(...)``, R ``(..., 3, 3)``, shift ``(..., 3)``."""

    scale: Tensor
    rotation: Tensor
    shift: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        """Move points ``(..., N, 3)``."""
        return self.scale[..., None, None] * (points @ self.rotation.mT) + self.shift[..., None, :]

    def pose(self, pose: Tensor) -> Tensor:
        """Move camera-to-world matrices ``(..., 4, 4)``; they stay rigid."""
        out = pose.clone()
        out[..., :3, :3] = self.rotation @ pose[..., :3, :3]
        centre = pose[..., :3, 3]
        out[..., :3, 3] = self.scale[..., None] * (self.rotation @ centre[..., None])[..., 0] + self.shift
        return out


def pixels(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Columns and rows ``(H * W, 2)`` relative to the principal point."""
    v, u = torch.meshgrid(
        torch.arange(height, device=device) - height / 2, torch.arange(width, device=device) - width / 2, indexing="ij"
    )
    return torch.stack([u.flatten(), v.flatten()], -1)


def unproject(depth: Tensor, focal: Tensor | float) -> Tensor:
    """Points ``(H, W, 3)`` of a depth map ``(H, W)``, in the camera's frame."""
    grid = pixels(depth.shape[0], depth.shape[1], depth.device).to(depth).unflatten(0, tuple(depth.shape))
    return torch.cat([grid * depth[..., None] / focal, depth[..., None]], -1)


def focal_length(
    points: Tensor, rounds: int = 10, low: float = 0.0, high: float = math.inf, valid: Tensor | None = None
) -> float:
    """Focal length in pixels of a pointmap ``(H, W, 3)`` in its own camera's frame, by Weiszfeld's iteration.

    Points behind the camera or more than 76 degrees off its axis do not count: a single one, a thousand times as steep
    as the others, would outweigh them all. The iteration starts at the median over the pixels. If no point counts, the
    result is the focal length of a 60-degree field of view.

    Args:
        rounds: iterations.
        low, high: limits as multiples of the focal length of a 60-degree field of view.
        valid: ``(H, W)`` pixels to use.
    """
    height, width = points.shape[:2]
    u = pixels(height, width, points.device).double()
    points = points.reshape(-1, 3).double()
    q = (points[:, :2] / points[:, 2:]).nan_to_num(posinf=0, neginf=0)
    base = max(height, width) / (2 * math.tan(math.radians(30)))
    counts = (points[:, 2] > 0) & (q.norm(dim=-1) < STEEPEST)
    if valid is not None:
        counts &= valid.reshape(-1)
    squares = (q * q).sum(-1)
    chosen = counts & (squares > 0)
    if not chosen.any():
        return float(min(max(base, low * base), high * base))
    weight = counts.double()
    focal = ((q * u).sum(-1)[chosen] / squares[chosen]).median()
    for _ in range(rounds):
        focal = _ratio(weight / (u - focal * q).norm(dim=-1).clamp_min(1e-8), q, u)
    return float(focal.clamp(low * base, high * base))


def _ratio(weight: Tensor, q: Tensor, u: Tensor) -> Tensor:
    return (weight * (q * u).sum(-1)).sum() / (weight * (q * q).sum(-1)).sum().clamp_min(1e-12)


def solve_pnp(points: Tensor, valid: Tensor, focal: float | None, rounds: int = 100) -> tuple[Tensor, float] | None:
    """Pose ``(4, 4)`` (camera to the points' frame) and focal length of the camera of a pointmap ``(H, W, 3)``.

    An unknown focal length is chosen, by the number of inliers, from 21 values from half to three times the longer
    side. None if fewer than four pixels are ``valid`` ``(H, W)`` or no pose is found. ``rounds`` are RANSAC's.
    """
    import cv2

    height, width = valid.shape
    mask = (valid & points.isfinite().all(-1)).reshape(-1).cpu().numpy()
    if mask.sum() < 4:
        return None
    world = points.reshape(-1, 3).double().cpu().numpy()[mask]
    # The same convention as OpenCV's: integer pixels, principal point (W/2, H/2).
    image = (pixels(height, width).double().numpy() + np.array([width / 2, height / 2]))[mask]
    side = max(height, width)
    best: tuple[int, np.ndarray, np.ndarray, float] | None = None
    for guess in np.geomspace(side / 2, side * 3, 21) if focal is None else [focal]:
        camera = np.array([[guess, 0, width / 2], [0, guess, height / 2], [0, 0, 1]], float)
        try:
            found, turn, shift, inliers = cv2.solvePnPRansac(
                world,
                image,
                camera,
                np.zeros(4),
                iterationsCount=rounds,
                reprojectionError=5.0,
                flags=cv2.SOLVEPNP_SQPNP,
            )
        except cv2.error:
            continue
        if found and inliers is not None and (best is None or len(inliers) > best[0]):
            best = (len(inliers), cv2.Rodrigues(turn)[0], shift[:, 0], float(guess))
    if best is None:
        return None
    _, rotation, shift, guess = best
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation.T, -rotation.T @ shift
    return torch.from_numpy(pose).to(points), guess


def umeyama(source: Tensor, target: Tensor, weight: Tensor | None = None, scaled: bool = True) -> Similarity:
    """The similarity (rigid unless ``scaled``) that maps ``source (..., N, 3)`` to ``target`` with the least weighted
    squares, computed in fp64; ``weight (..., N)``."""
    kind = source.dtype
    source, target = source.double(), target.double()
    weight = torch.ones_like(source[..., 0]) if weight is None else weight.double()
    weight = (weight / weight.sum(-1, keepdim=True).clamp_min(1e-300))[..., None]
    middle, goal = (weight * source).sum(-2), (weight * target).sum(-2)
    a, b = source - middle[..., None, :], target - goal[..., None, :]
    u, s, vt = torch.linalg.svd((weight * b).mT @ a)
    sign = torch.ones_like(s)
    sign[..., 2] = torch.linalg.det(u @ vt).sign()
    rotation = (u * sign[..., None, :]) @ vt
    variance = (weight * a * a).sum((-1, -2))
    scale = (s * sign).sum(-1) / variance.clamp_min(1e-300) if scaled else torch.ones_like(variance)
    shift = goal - scale[..., None] * (rotation @ middle[..., None])[..., 0]
    return Similarity(scale.to(kind), rotation.to(kind), shift.to(kind))


def nearest_similarity(source: Tensor, target: Tensor, weight: Tensor | None = None, rounds: int = 10) -> Similarity:
    """The similarity with the least weighted sum of distances (not squared), by reweighting :func:`umeyama`.

    Least squares shrink the scale if points of ``source`` are scattered, by a few per cent for a few per cent of
    outliers, which accumulates along a chain of pictures; distances follow the majority.
    """
    weight = torch.ones_like(source[..., 0]) if weight is None else weight
    move = umeyama(source, target, weight)
    for _ in range(rounds):
        apart = (move(source) - target).norm(dim=-1)
        typical = (weight * apart).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp_min(1e-12)
        move = umeyama(source, target, weight / apart.clamp_min(1e-3 * typical + 1e-12))
    return move


def quaternion_matrix(q: Tensor) -> Tensor:
    """Rotation matrices ``(..., 3, 3)`` of quaternions ``(..., 4)`` (x, y, z, w), which need not be normalised."""
    x, y, z, w = F.normalize(q, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def matrix_quaternion(rotation: Tensor) -> Tensor:
    """Quaternions (x, y, z, w) of rotation matrices: the largest eigenvector of Bar-Itzhack's symmetric matrix."""
    m = rotation.double()
    (a, b, c), (d, e, f), (g, h, i) = ([m[..., r, k] for k in range(3)] for r in range(3))
    zero = torch.zeros_like(a)
    k = torch.stack(
        [a - e - i, zero, zero, zero, d + b, e - a - i, zero, zero, g + c, h + f, i - a - e, zero,
         h - f, c - g, d - b, a + e + i], -1
    ).unflatten(-1, (4, 4)) / 3  # fmt: skip
    return torch.linalg.eigh(k, UPLO="L").eigenvectors[..., -1].to(rotation)


def rotation_angle(first: Tensor, second: Tensor) -> Tensor:
    """Degrees between rotations ``(..., 3, 3)``."""
    difference = (first.double().mT @ second.double()) - torch.eye(3, dtype=torch.float64, device=first.device)
    # || R - 1 ||_F = 2 sqrt(2) sin(angle / 2): accurate for small angles, where the arc cosine is not.
    return torch.rad2deg(2 * torch.asin((difference.flatten(-2).norm(dim=-1) / math.sqrt(8)).clamp(max=1)))
