"""DUSt3R's confidence-aware regression loss, for pre-training and for LoRA3D's self-calibration.

"DUSt3R: Geometric 3D Vision Made Easy" (arXiv 2312.14132), section 3.2. With z and z' the mean distances to the origin
of predicted and true points over the valid pixels of both views together, and l = || x / z - x' / z' ||,

    L = sum over views of  mean over valid pixels of  ( C l - alpha log C ).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.geometry.network import Points

ALPHA = 0.2


def scale_of(points: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor]) -> Tensor:
    """Mean distance to the origin ``(B,)`` over the valid pixels ``(B, H, W)`` of both views' points
    ``(B, H, W, 3)``."""
    total = sum(
        torch.where(mask, x.norm(dim=-1), 0).flatten(1).sum(1) for x, mask in zip(points, valid, strict=True)
    )  # fmt: skip
    count = sum(mask.flatten(1).sum(1) for mask in valid)
    return torch.as_tensor(total) / torch.as_tensor(count).clamp_min(1)


def regression(
    predicted: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Distances ``(B, H, W)`` of both views, predictions and targets each divided by their own scale."""
    own = scale_of(predicted, valid)[:, None, None, None].clamp_min(1e-8)
    true = scale_of(target, valid)[:, None, None, None].clamp_min(1e-8)
    first, second = ((x / own - y / true).norm(dim=-1) for x, y in zip(predicted, target, strict=True))
    return first, second


def confidence_loss(
    predicted: tuple[Points, Points],
    target: tuple[Tensor, Tensor],
    valid: tuple[Tensor, Tensor],
    alpha: float = ALPHA,
) -> Tensor:
    """The loss, which may be negative; pixels that are not ``valid`` ``(B, H, W)`` do not contribute."""
    target = (torch.where(valid[0][..., None], target[0], 0.0), torch.where(valid[1][..., None], target[1], 0.0))
    distances = regression((predicted[0].points, predicted[1].points), target, valid)
    loss = predicted[0].points.new_zeros(())
    for (_, confidence), distance, mask in zip(predicted, distances, valid, strict=True):
        pixel = confidence * distance - alpha * confidence.log()
        loss = loss + torch.where(mask, pixel, 0).sum() / mask.sum().clamp_min(1)
    return loss
