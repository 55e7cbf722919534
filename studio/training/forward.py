"""One forward pass: random numbers, noisy latents, prediction, loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from adapters.plugin import Outputs
from studio.datasets.seeds import normal, uniform
from studio.training.families import Family
from studio.training.objective import elementwise_loss, levels, per_sample, with_prior
from studio.training.schemas.image import TrainImageConfig
from studio.training.supply import Batch


@dataclass(frozen=True)
class Draws:
    """Random numbers of a batch (CPU, fp32). ``noise`` is the target's, ``disturbance`` goes on the input only."""

    posterior: torch.Tensor
    noise: torch.Tensor
    disturbance: torch.Tensor | None
    u: torch.Tensor


def draw(batch: Batch, config: TrainImageConfig, seed: int) -> Draws:
    """Random numbers of every sample from its own streams, so that one option's draws do not change another's."""
    shape = batch.moments.shape[2:]

    def stream(name: str, inner: Sequence[int]) -> torch.Tensor:
        shown = normal(seed, name, batch.numbers[: batch.shown], inner)
        if batch.shown == len(batch.numbers):
            return shown
        return torch.cat([shown, normal(seed, f"prior-{name}", batch.numbers[batch.shown :], inner)])

    noise = stream("noise", shape)
    if config.noise_offset:
        strength = torch.full((len(noise),), config.noise_offset)
        if config.noise_offset_random:
            strength = strength * uniform(seed, "offset-strength", batch.numbers)
        noise = noise + strength.view(-1, 1, 1, 1) * stream("offset", (shape[0], 1, 1))
    disturbance = config.input_perturbation * stream("perturbation", shape) if config.input_perturbation else None
    u = uniform(seed, "time", batch.numbers[: batch.shown])
    if batch.shown < len(batch.numbers):
        u = torch.cat([u, uniform(seed, "prior-time", batch.numbers[batch.shown :])])
    return Draws(stream("posterior", shape), noise, disturbance, u)


def training_loss(
    trainee: nn.Module,
    family: Family,
    batch: Batch,
    draws: Draws,
    config: TrainImageConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, Outputs]:
    """The loss of a batch (with gradients), and what plugins may want to see."""
    process = family.process
    sampling = process.default_sampling if config.timestep_sampling == "auto" else config.timestep_sampling
    u = levels(
        draws.u,
        sampling=sampling,
        mean=config.logit_mean,
        std=config.logit_std,
        shift=process.default_shift if config.timestep_shift is None else config.timestep_shift,
        low=config.timestep_min,
        high=config.timestep_max,
    )
    times = process.times(u).to(device)
    clean = family.latents(batch.moments.to(device), draws.posterior.to(device))
    noise = draws.noise.to(device)
    entering = noise if draws.disturbance is None else noise + draws.disturbance.to(device)
    noisy = process.noisy(clean, entering, times)
    given = {name: value.to(device) for name, value in batch.given.items()}
    prediction = trainee(noisy.to(dtype), times, given)
    target = process.target(clean, noise, times)
    losses = per_sample(elementwise_loss(prediction, target, config.loss, config.huber_delta))
    if config.snr_gamma is not None:
        losses = losses * process.min_snr_weights(times, config.snr_gamma)
    loss = with_prior(losses, batch.shown, config.prior_weight)
    return loss, Outputs(prediction, target, losses, times, batch.shown)


@torch.no_grad()
def validation_loss(
    trainee: nn.Module,
    family: Family,
    batches: Sequence[Batch],
    config: TrainImageConfig,
    device: torch.device,
    dtype: torch.dtype,
    levels_per_picture: int = 4,
) -> float:
    """Mean loss over ``batches`` at fixed noise levels (the middles of equal parts) and fixed noise."""
    total, count = 0.0, 0
    for batch in batches:
        draws = draw(batch, config, seed=derive_validation(config.seed))
        for part in range(levels_per_picture):
            u = torch.full_like(draws.u, (part + 0.5) / levels_per_picture)
            fixed = Draws(draws.posterior, draws.noise, None, u)
            loss, _ = training_loss(trainee, family, batch, fixed, config, device, dtype)
            total, count = total + float(loss) * len(u), count + len(u)
    return total / max(1, count)


def derive_validation(seed: int) -> int:
    """A seed whose streams no training sample uses."""
    return -seed - 1
