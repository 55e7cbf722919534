"""Latent re-initialisation of LoRA-Composer (arXiv 2403.11627): start each region from noise that suits its subject.

One conditional pass on the initial noise gives every subject's cross-attention over the whole picture. The window of
the region's size with the most attention (summed over the subject's tokens) is where the noise already resembles the
subject; its content, always of the original noise, is copied into the region. Finally the latents are restored to their
original mean and standard deviation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def best_window(attention: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the top left cell of the window of ``size`` with the most ``attention`` (height, width)."""
    kernel = torch.ones(1, 1, *size, device=attention.device, dtype=attention.dtype)
    sums = F.conv2d(attention[None, None], kernel)[0, 0]
    best = int(sums.argmax())
    return best // sums.shape[1], best % sums.shape[1]


def bounds(mask: Tensor) -> tuple[int, int, int, int]:
    """First row, end row, first column, end column of the cells of ``mask`` (height, width)."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def rearranged(latents: Tensor, attention: Tensor, masks: Sequence[Tensor], factor: int) -> Tensor:
    """Latents with the content of every region copied from its best window.

    Args:
        latents: (batch, channels, height, width).
        attention: to each region's subject, on the grid of the maps (batch, regions, rows, columns).
        masks: each region's hard mask on that grid (rows, columns).
        factor: latents per cell of that grid, in each direction.
    """
    made = latents.clone()
    height, width = latents.shape[2:]
    for sample in range(len(latents)):
        for region, mask in enumerate(masks):
            inside = mask.bool()
            top, bottom, left, right = bounds(inside)
            row, column = best_window(attention[sample, region], (bottom - top, right - left))
            fine = inside[top:bottom, left:right].repeat_interleave(factor, 0).repeat_interleave(factor, 1)
            y, x, source_y, source_x = top * factor, left * factor, row * factor, column * factor
            rows = min(fine.shape[0], height - y, height - source_y)
            columns = min(fine.shape[1], width - x, width - source_x)
            fine = fine[:rows, :columns].to(latents.device)
            target = made[sample, :, y : y + rows, x : x + columns]
            source = latents[sample, :, source_y : source_y + rows, source_x : source_x + columns]
            made[sample, :, y : y + rows, x : x + columns] = torch.where(fine, source, target)
    if torch.equal(made, latents):
        return made
    return _restored(made, latents)


def _restored(made: Tensor, before: Tensor) -> Tensor:
    """``made`` with the mean and standard deviation of ``before``, per sample."""
    axes = (1, 2, 3)
    normal = (made - made.mean(axes, keepdim=True)) / made.std(axes, keepdim=True)
    return normal * before.std(axes, keepdim=True) + before.mean(axes, keepdim=True)
