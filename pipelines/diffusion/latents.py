"""Scaling between the autoencoder's output and the denoiser's latents, by the VAE's configuration.

With mean m and standard deviation s per channel (0 and 1 if there are none), shift h and scale c:

    latents = (z - m - h) c / s        z = latents s / c + m + h
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scaled(encoded: Tensor, config: Any) -> Tensor:
    """Latents (batch, channels, h, w) from the autoencoder's output ``encoded``; ``config`` is the VAE's.

    Those of videos have their frames before the height.
    """
    shift: float = getattr(config, "shift_factor", None) or 0.0
    statistics = _statistics(config, encoded)
    scale: float = config.get("scaling_factor", 1.0)
    if statistics is None:
        return (encoded - shift) * scale
    mean, deviation = statistics
    return (encoded - mean - shift) * scale / deviation


def unscaled(latents: Tensor, config: Any) -> Tensor:
    """The autoencoder's input for decoding: the inverse of :func:`scaled`."""
    shift: float = getattr(config, "shift_factor", None) or 0.0
    statistics = _statistics(config, latents)
    scale: float = config.get("scaling_factor", 1.0)
    if statistics is None:
        return latents / scale + shift
    mean, deviation = statistics
    return latents * deviation / scale + mean + shift


def moments(vae: Any, pixels: Tensor) -> Tensor:
    """Mean and deviation (batch, 2, channels, h, w) of the latents of pictures (batch, 3, height, width)."""
    pixels = pixels.to(vae.device, vae.dtype)
    posterior = vae.encode(pixels[:, :, None] if has_frames(vae) else pixels).latent_dist
    found = torch.stack([posterior.mean, posterior.std], 1)
    return found[:, :, :, 0] if has_frames(vae) else found


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Pictures (batch, 3, height, width) of the autoencoder's input (batch, channels, h, w)."""
    latents = latents.to(vae.dtype)
    picture: Tensor = vae.decode(latents[:, :, None] if has_frames(vae) else latents, return_dict=False)[0]
    return picture[:, :, 0] if has_frames(vae) else picture


def has_frames(vae: Any) -> bool:
    """Whether it is a video autoencoder, for which a picture is a single frame (batch, channels, 1, h, w)."""
    return "temperal_downsample" in vae.config  # diffusers' spelling


def _statistics(config: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if not mean or not deviation:  # the pipeline takes both or neither
        return None
    return tuple(torch.tensor(values).view(1, -1, *[1] * (like.ndim - 2)).to(like) for values in (mean, deviation))  # type: ignore[return-value]
