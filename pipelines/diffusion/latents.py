"""Scaling between the autoencoder's output and the denoiser's latents, by the VAE's configuration.

With mean m and standard deviation s per channel (0 and 1 if there are none), shift h and scale c:

    latents = (z - m - h) c / s        z = latents s / c + m + h
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scaled(encoded: Tensor, config: Any) -> Tensor:
    """Latents (batch, channels, h, w) from the autoencoder's output ``encoded``; ``config`` is the VAE's."""
    shift: float = getattr(config, "shift_factor", None) or 0.0
    statistics = _statistics(config, encoded)
    scale: float = config.scaling_factor
    if statistics is None:
        return (encoded - shift) * scale
    mean, deviation = statistics
    return (encoded - mean - shift) * scale / deviation


def unscaled(latents: Tensor, config: Any) -> Tensor:
    """The autoencoder's input for decoding: the inverse of :func:`scaled`."""
    shift: float = getattr(config, "shift_factor", None) or 0.0
    statistics = _statistics(config, latents)
    scale: float = config.scaling_factor
    if statistics is None:
        return latents / scale + shift
    mean, deviation = statistics
    return latents * deviation / scale + mean + shift


def _statistics(config: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if not mean or not deviation:  # the pipeline takes both or neither
        return None
    return tuple(torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (mean, deviation))  # type: ignore[return-value]
