"""Small previews of unfinished latents."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.diffusion.latents import unscaled

LARGEST = 64
"""Latents are first shrunk to this many cells per side, so that a preview is cheap at any size."""


@torch.no_grad()
def preview(pipe: Any, latents: Tensor, height: int, width: int) -> Any:
    """The first picture of ``latents`` decoded at a small size, as a PIL image."""
    latents = latents[:1]
    if latents.ndim == 3:  # Flux packs 2 x 2 cells into one token
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    largest = max(latents.shape[-2:])
    if largest > LARGEST:
        latents = F.interpolate(latents.float(), scale_factor=LARGEST / largest, mode="area").to(latents.dtype)
    picture = pipe.vae.decode(unscaled(latents, pipe.vae.config).to(pipe.vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(picture.float(), output_type="pil")[0]
