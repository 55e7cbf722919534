"""What the denoiser learns to predict: noise levels, noisy latents, targets and loss weights.

Two processes share one interface.

* Diffusion (SD, SDXL): levels are integers t in 0..T-1, ``x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) e``; the target is
  e (epsilon), ``v = sqrt(abar_t) e - sqrt(1 - abar_t) x0`` (v_prediction) or x0 (sample).
* Flow matching (SD3, Flux): levels are sigma in (0, 1], ``x_s = (1 - s) x0 + s e``; the target is ``e - x0``.

``u`` in (0, 1) is a level before the process maps it: 0 is clean, 1 is pure noise.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from adapters.errors import InputError


class Process(Protocol):
    """The forward process of a model family."""

    default_sampling: str
    default_shift: float

    def times(self, u: torch.Tensor) -> torch.Tensor:
        """Levels ``(batch,)`` in the form :meth:`noisy` and the denoiser take."""

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor: ...

    def target(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor: ...

    def min_snr_weights(self, times: torch.Tensor, gamma: float) -> torch.Tensor:
        """Loss weights ``(batch,)``."""

    def check_min_snr(self) -> None:
        """Raises :class:`InputError` where min-SNR weights are undefined."""


class Diffusion:
    """Variance-preserving diffusion with the noise schedule of a diffusers scheduler.

    Args:
        scheduler_config: configuration of the base model's scheduler (any solver; the noise schedule counts).
    """

    default_sampling = "uniform"
    default_shift = 1.0

    def __init__(self, scheduler_config: Any) -> None:
        from diffusers import DDPMScheduler

        kind: Any = DDPMScheduler
        scheduler = kind.from_config(scheduler_config)
        self.prediction = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise InputError(f"The base model predicts '{self.prediction}', which cannot be trained.")
        self.alphas_cumprod: torch.Tensor = scheduler.alphas_cumprod.float()

    def times(self, u: torch.Tensor) -> torch.Tensor:
        count = len(self.alphas_cumprod)
        return (u * count).long().clamp(0, count - 1)

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        signal, spread = self._coefficients(times, clean)
        return signal * clean + spread * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        signal, spread = self._coefficients(times, clean)
        return signal * noise - spread * clean

    def snr(self, times: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio ``abar_t / (1 - abar_t)``."""
        abar = self.alphas_cumprod.to(times.device)[times]
        ratio: torch.Tensor = abar / (1 - abar)
        return ratio

    def min_snr_weights(self, times: torch.Tensor, gamma: float) -> torch.Tensor:
        """``min(SNR, gamma)`` over SNR (epsilon), SNR + 1 (v) or 1 (sample). Hang et al. 2023, arXiv 2303.09556."""
        snr = self.snr(times)
        capped = snr.clamp(max=gamma)
        if self.prediction == "v_prediction":
            return capped / (snr + 1)
        if self.prediction == "sample":
            return capped
        return capped / snr

    def check_min_snr(self) -> None:
        if self.prediction == "epsilon" and not bool(self.alphas_cumprod[-1] > 0):
            raise InputError(
                "The base model's last noise level has no signal left (zero terminal SNR), where min-SNR weights of "
                "an epsilon model are undefined: leave snr_gamma empty."
            )

    def _coefficients(self, times: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        abar = self.alphas_cumprod.to(like.device)[times].view(-1, *[1] * (like.ndim - 1))
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)


class FlowMatching:
    """Rectified flow: straight lines between picture and noise.

    Args:
        scheduler_config: configuration of a ``FlowMatchEulerDiscreteScheduler`` (its ``shift`` is the default one), or
            of another sampler of flows, which calls it ``flow_shift``.
        shift: another default shift.
    """

    default_sampling = "logit-normal"

    def __init__(self, scheduler_config: Any, shift: float | None = None) -> None:
        dynamic = scheduler_config.get("use_dynamic_shifting", False)
        told = scheduler_config.get("shift", scheduler_config.get("flow_shift")) or 1.0
        own = 1.0 if dynamic else float(told)
        self.default_shift = own if shift is None else shift

    def times(self, u: torch.Tensor) -> torch.Tensor:
        return u.clamp(min=1e-5, max=1.0)

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        sigma = times.view(-1, *[1] * (clean.ndim - 1)).to(clean.dtype)
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return noise - clean

    def min_snr_weights(self, times: torch.Tensor, gamma: float) -> torch.Tensor:
        raise InputError("Min-SNR weights mean nothing for flow matching models (SD3, Flux): leave snr_gamma empty.")

    def check_min_snr(self) -> None:
        self.min_snr_weights(torch.empty(0), 1.0)


def levels(
    u: torch.Tensor, *, sampling: str, mean: float, std: float, shift: float, low: float, high: float
) -> torch.Tensor:
    """Turn uniform numbers into noise levels: distribution, then shift, then range ``[low, high]``.

    ``logit-normal``: sigmoid of a normal number (Esser et al. 2024, arXiv 2403.03206); the normal comes from ``u`` by
    the inverse distribution function. ``shift``: ``s u / (1 + (s - 1) u)``, which moves u towards 1 for s > 1.
    """
    if sampling == "logit-normal":
        u = torch.sigmoid(mean + std * torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))).float()
    u = shift * u / (1 + (shift - 1) * u)
    return low + (high - low) * u


def elementwise_loss(prediction: torch.Tensor, target: torch.Tensor, kind: str, delta: float) -> torch.Tensor:
    """Loss per element: squared (l2), absolute (l1), or huber: ``2 d (sqrt(e^2 + d^2) - d)``, quadratic near 0."""
    error = prediction.float() - target.float()
    if kind == "l2":
        return error.square()
    if kind == "l1":
        return error.abs()
    return 2 * delta * ((error.square() + delta**2).sqrt() - delta)


def per_sample(loss: torch.Tensor) -> torch.Tensor:
    """Mean over everything but the batch: ``(batch, ...)`` -> ``(batch,)``."""
    return loss.flatten(1).mean(1)


def with_prior(losses: torch.Tensor, shown: int, weight: float) -> torch.Tensor:
    """Prior preservation: mean over the shown pictures + weight * mean over the class pictures after them.

    Each half has its own mean (Ruiz et al. 2022, arXiv 2208.12242), whatever its size.
    """
    if shown == len(losses):
        return losses.mean()
    return losses[:shown].mean() + weight * losses[shown:].mean()
