"""Automatic regions: where the first steps place each subject.

The first steps (a share of all) are made with all adapters everywhere and the whole prompt. The attention of the
picture's cells to each subject's words is averaged over them: in a UNet cross-attention on one grid, in SD3 and Flux
the part of joint attention from picture to text. With v_i = M_i / mean(M_i), a cell belongs to the subject with the
largest v_i if that is above 1 (above its own average), else to the background. Then sampling restarts from the same
noise with these regions. The idea of masks from early attention is from FreeFuse (arXiv 2510.23515) and LoRAShop (arXiv
2505.23758); the rule is ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def assigned(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Masks (subjects, height, width) on a finer ``grid``, from the subjects' attention (subjects, rows, columns).

    A subject that gets no cell is assigned the tenth of all cells with the most attention to it.
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
