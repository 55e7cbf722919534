"""Guidance strength as an input of a UNet: "On Distillation of Guided Diffusion Models" (arXiv 2210.03142), stage 1.

The time embedding gets another term, ``cond_proj(sinusoid(1000 w'))`` with w' = w - 1, as in diffusers' UNets with
``time_cond_proj_dim``. The projection starts at zero, so it changes nothing before training; it is not a LoRA and is
stored in a separate file beside the LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters.errors import FamilyError, InputError
from adapters.formats.tensors import read_tensors, write_tensors

WIDTH = 256
NAME = "w-embedding"
"""Part of the name of the projection's file."""
KEY = "time_embedding.cond_proj.weight"


def sinusoid(w: Tensor, width: int = WIDTH) -> Tensor:
    """Sinusoids (batch, width) of 1000 (w - 1), as diffusers' ``get_guidance_scale_embedding(w - 1)`` computes them."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000.0 * (w.float() - 1)[:, None] * frequencies.to(w.device)[None, :]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def add_projection(unet: Any) -> None:
    """Give ``unet`` a trainable projection (width -> channels) that starts at zero.

    Raises:
        InputError: the denoiser is not a UNet with a time embedding.
    """
    place = _time_embedding(unet)
    projection = nn.Linear(WIDTH, place.linear_1.in_features, bias=False, device=unet.device, dtype=torch.float32)
    nn.init.zeros_(projection.weight)
    place.cond_proj = projection
    projection.requires_grad_(True)


@contextmanager
def announced(unet: Any) -> Iterator[None]:
    """Inside, the UNet's configuration declares the guidance input, so diffusers' pipelines make only one pass."""
    before = unet.config.time_cond_proj_dim
    unet.register_to_config(time_cond_proj_dim=WIDTH)
    try:
        yield
    finally:
        unet.register_to_config(time_cond_proj_dim=before)


@contextmanager
def attached(unet: Any, weight: Tensor) -> Iterator[None]:
    """Inside, ``unet`` has the projection ``weight`` and declares it; both are undone on exit.

    Raises:
        InputError: the denoiser is not a UNet with a time embedding.
        FamilyError: the weight is for another model.
    """
    place = _time_embedding(unet)
    channels = place.linear_1.in_features
    if tuple(weight.shape) != (channels, WIDTH):
        raise FamilyError(
            f"The guidance embedding has shape {tuple(weight.shape)}, but this model needs {(channels, WIDTH)}: "
            "it was made for another base model."
        )
    before = place.cond_proj
    projection = nn.Linear(WIDTH, channels, bias=False, device=unet.device, dtype=unet.dtype)
    with torch.no_grad():
        projection.weight.copy_(weight)
    place.cond_proj = projection.requires_grad_(False)
    try:
        with announced(unet):
            yield
    finally:
        place.cond_proj = before


def write(path: Path, weight: Tensor, metadata: Mapping[str, str]) -> Path:
    """Write the projection; returns the path."""
    return write_tensors(path, {KEY: weight.detach().cpu().float().contiguous()}, dict(metadata))


def read(path: Path) -> Tensor:
    """Read the projection from a file.

    Raises:
        InputError: the file is missing or contains something else.
    """
    if not path.is_file():
        raise InputError(
            f"The distilled adapter needs its guidance embedding '{path.name}', which is missing: copy it to "
            f"'{path.parent}'."
        )
    tensors, _ = read_tensors(path)
    if set(tensors) != {KEY}:
        raise InputError(f"'{path.name}' is not a guidance embedding (it should contain only '{KEY}').")
    return tensors[KEY]


def _time_embedding(unet: Any) -> Any:
    place = getattr(unet, "time_embedding", None)
    if place is None or not hasattr(place, "cond_proj"):
        raise InputError(
            "Guidance as an embedding is for UNet models (SD, SDXL): choose guidance_mode 'fixed' or 'strength'."
        )
    return place
