"""Latent Consistency Models (arXiv 2310.04378) as a LoRA (LCM-LoRA, arXiv 2311.05556): a picture in two to eight steps.

A function f maps every state z_t of a sampling path to the path's end, f(z, 0) = z. With the teacher's guided
prediction, one DDIM step leads from a knot t to the next knot t' < t, and both must map to the same end:

    L = d( f(z_t, t),  stop_gradient f(z_t', t') ),      z_t' = ddim(z_t, eps_w(z_t, t), t -> t')

    f(z, t) = c_skip z + c_out x0(z, t),   s = 0.5
    c_skip = s^2 / ((10 t)^2 + s^2),       c_out = 10 t / sqrt((10 t)^2 + s^2)

Both f are the student (no averaged copy for a LoRA); d is the squared distance or the pseudo-Huber distance
sqrt(e^2 + c^2) - c. The knots are every (T / knots)-th level. For rectified flow, x0 = z - sigma v already gives
f(z, 0) = z, and a step is Euler's along v.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from adapters.catalogue import Method
from adapters.errors import InputError

METHOD = Method(
    name="consistency-distillation",
    title="Latent consistency (LCM-LoRA)",
    summary="Trains a LoRA to jump to the end of the sampling path: pictures in 2 to 8 steps, with guidance built in.",
    stage="learn",
    makes="ordinary LoRA",
    paper="LCM-LoRA: A Universal Stable-Diffusion Acceleration Module, arXiv 2311.05556",
    entry="pipelines.diffusion.distillation.consistency:boundary",
)

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Path(Protocol):
    """The teacher's sampling path: its knots, one step along it, and the consistency function."""

    def start(self) -> Tensor:
        """Levels of all knots (knots,), cleanest first."""

    def end(self, start: Tensor) -> Tensor:
        """The level that a step from ``start`` (batch,) leads to."""

    def step(self, noisy: Tensor, prediction: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """The state at ``end``, from the state ``noisy`` and the denoiser's ``prediction`` at ``start``."""

    def jump(self, noisy: Tensor, prediction: Tensor, level: Tensor) -> Tensor:
        """f: the end of the path, estimated from ``prediction`` at ``level``."""


class DiffusionPath:
    """DDIM between knots of a variance-preserving diffusion; levels are integer timesteps.

    Args:
        alphas_cumprod: signal shares (T,).
        prediction: what the denoiser predicts: "epsilon", "v_prediction" or "sample".
        knots: number of knots, T / knots timesteps apart.

    Raises:
        InputError: an unknown prediction type, or more knots than timesteps.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: str, knots: int) -> None:
        if prediction not in PREDICTIONS:
            raise InputError(f"The base model predicts '{prediction}'; supported are {', '.join(PREDICTIONS)}.")
        if not 1 <= knots <= len(alphas_cumprod):
            raise InputError(f"knots must be between 1 and {len(alphas_cumprod)}, got {knots}.")
        self.alphas_cumprod, self.prediction = alphas_cumprod, prediction
        self.knots, self.stride = knots, len(alphas_cumprod) // knots

    def start(self) -> Tensor:
        return torch.arange(1, self.knots + 1) * self.stride - 1

    def end(self, start: Tensor) -> Tensor:
        return (start - self.stride).clamp(min=0)

    def step(self, noisy: Tensor, prediction: Tensor, start: Tensor, end: Tensor) -> Tensor:
        clean, noise = self.clean_and_noise(noisy, prediction, start)
        signal, spread = self._coefficients(end, noisy)
        return signal * clean + spread * noise

    def jump(self, noisy: Tensor, prediction: Tensor, level: Tensor) -> Tensor:
        clean, _ = self.clean_and_noise(noisy, prediction, level)
        skip, out = (value.to(noisy).view(-1, *[1] * (noisy.ndim - 1)) for value in boundary(level))
        return skip * noisy + out * clean

    def clean_and_noise(self, noisy: Tensor, prediction: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and e implied by the prediction, where noisy = sqrt(abar) x0 + sqrt(1 - abar) e."""
        signal, spread = self._coefficients(level, noisy)
        if self.prediction == "epsilon":
            return (noisy - spread * prediction) / signal, prediction
        if self.prediction == "sample":
            return prediction, (noisy - signal * prediction) / spread
        return signal * noisy - spread * prediction, signal * prediction + spread * noisy

    def _coefficients(self, level: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod.to(like.device)[level].view(-1, *[1] * (like.ndim - 1))
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)


class FlowPath:
    """Euler steps along a rectified flow; levels are sigmas, evenly spaced and then shifted as in sampling.

    Args:
        shift: s in  s u / (1 + (s - 1) u).
        knots: number of knots.

    Raises:
        InputError: fewer than one knot.
    """

    def __init__(self, shift: float, knots: int) -> None:
        if knots < 1:
            raise InputError(f"knots must be at least 1, got {knots}.")
        even = torch.arange(0, knots + 1, dtype=torch.float64) / knots
        self.sigmas = (shift * even / (1 + (shift - 1) * even)).float()

    def start(self) -> Tensor:
        return self.sigmas[1:]

    def end(self, start: Tensor) -> Tensor:
        sigmas = self.sigmas.to(start.device)
        return sigmas[torch.searchsorted(sigmas, start.contiguous()) - 1]

    def step(self, noisy: Tensor, prediction: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return noisy + _wide(end - start, noisy) * prediction

    def jump(self, noisy: Tensor, prediction: Tensor, level: Tensor) -> Tensor:
        return noisy - _wide(level, noisy) * prediction


def boundary(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out at ``timesteps``: (1, 0) at 0, so that f(z, 0) = z whatever the network predicts."""
    scaled = TIMESTEP_SCALING * timesteps.double()
    spread = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / spread, scaled / spread.sqrt()


def pseudo_huber(first: Tensor, second: Tensor, c: float) -> Tensor:
    """sqrt(e^2 + c^2) - c per element: quadratic for errors far below ``c``, absolute far above."""
    error = first.float() - second.float()
    return (error.square() + c**2).sqrt() - c


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, *[1] * (like.ndim - 1))
