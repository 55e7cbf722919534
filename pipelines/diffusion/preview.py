"""Small previews of unfinished latents."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.diffusion.families import family_of

LARGEST = 64
"""Latents are first shrunk to this many cells per side, so that a preview is cheap at any size."""


@torch.no_grad()
def preview(pipe: Any, latents: Tensor, height: int, width: int) -> Any:
    """The first picture (of a video its first frame) of ``latents`` decoded at a small size, as a PIL image."""
    family, latents = family_of(pipe), latents[:1]
    if latents.ndim == 5:  # (batch, channels, frames, h, w)
        latents = latents[:, :, 0]
    if latents.ndim == 3:  # tokens, each of several cells
        latents = family.unpacked(pipe, latents, height, width)
    largest = max(latents.shape[-2:])
    if largest > LARGEST:
        latents = F.interpolate(latents.float(), scale_factor=LARGEST / largest, mode="area").to(latents.dtype)
    processor = pipe.video_processor if family.video else pipe.image_processor
    return processor.postprocess(family.decoded(pipe, latents).float(), output_type="pil")[0]
