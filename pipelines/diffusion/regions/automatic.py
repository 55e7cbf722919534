"""Automatic regions: where the first steps already draw each subject.

The first steps (a share of all of them) are made with all adapters everywhere and the whole prompt; the attention that
cells of the picture pay to every subject's words is averaged over them: in a UNet cross-attention on one grid, in SD3
and Flux the part of joint attention from picture to text. With v_i = M_i / mean(M_i), a cell belongs to the subject
with the largest v_i if that is above 1 (above its own average), else to the background. Then the picture is begun
anew from the same noise with these regions. The idea of masks from early attention is that of FreeFuse (arXiv
2510.23515) and LoRAShop (arXiv 2505.23758); the rule is ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def assigned(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention of the subjects (subjects, rows, columns) -> their masks (subjects, height, width) on a finer grid.

    A subject that no cell prefers gets the tenth of the cells that prefer it most.
    """
    fine = F.interpolate(attention[None].float(), grid, mode="bilinear", align_corners=False)[0]
    relative = fine / fine.mean((1, 2), keepdim=True).clamp(min=1e-12)
    best = relative.argmax(0)
    masks = torch.stack([(best == i) & (relative[i] > 1) for i in range(len(relative))])
    few = max(1, round(0.1 * relative[0].numel()))
    for i in range(len(masks)):
        if not bool(masks[i].any()):
            chosen = torch.zeros_like(masks[i])
            chosen.view(-1)[relative[i].flatten().topk(few).indices] = True
            masks &= ~chosen
            masks[i] = chosen
    return masks.float()
