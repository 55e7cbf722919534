"""Loads the base model for training: a plain diffusers pipeline in the right precision, on the right device."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.precision import DTYPES
from studio.training.schemas.image import TrainImageConfig

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def settle(pipe: Any) -> Any:
    """Freeze every part, switch to evaluation and keep a VAE that overflows in fp16 in fp32."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    if pipe.vae.dtype == torch.float16 and getattr(pipe.vae.config, "force_upcast", False):
        pipe.vae.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_base(config: TrainImageConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """The base model's diffusers pipeline, frozen, on ``device``.

    Raises:
        InputError: there is no such base, it is damaged, or its family is not the configuration's.
    """
    from pipelines.diffusion.loading import open_pipeline
    from studio import library

    source = library.resolve_pipeline(config.base)
    pipe, _, _ = open_pipeline(
        source, config.family, NAMES[dtype], str(device), config.attention,
        quantization=config.quantization, denoiser=config.denoiser,
    )  # fmt: skip
    return settle(pipe)
