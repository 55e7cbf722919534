"""Optimisers by name, parameter groups, and the learning rate over the run."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adapters.errors import InputError, MissingDependencyError
from studio.training.schemas.base import AdapterTrainConfig

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One optimiser: how to make it, and the package and extra it needs besides torch and transformers."""

    make: Callable[[Groups, AdapterTrainConfig], torch.optim.Optimizer]
    package: str = ""
    extra: str = ""

    @property
    def installed(self) -> bool:
        return not self.package or importlib.util.find_spec(self.package) is not None


def _adamw(groups: Groups, config: AdapterTrainConfig) -> torch.optim.Optimizer:
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=fused)


def _adamw8bit(groups: Groups, config: AdapterTrainConfig) -> torch.optim.Optimizer:
    import bitsandbytes

    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        groups, betas=(config.beta1, config.beta2), eps=config.epsilon
    )
    return made


def _adafactor(groups: Groups, config: AdapterTrainConfig) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    kind: Any = Adafactor
    made: torch.optim.Optimizer = kind(groups, scale_parameter=False, relative_step=False, warmup_init=False)
    return made


def _sgd(groups: Groups, config: AdapterTrainConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=config.beta1)


def _prodigy(groups: Groups, config: AdapterTrainConfig) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    made: torch.optim.Optimizer = Prodigy(
        groups,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        decouple=True,
        use_bias_correction=True,
        safeguard_warmup=True,
    )
    return made


def _schedulefree(groups: Groups, config: AdapterTrainConfig) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    made: torch.optim.Optimizer = AdamWScheduleFree(groups, betas=(config.beta1, config.beta2), eps=config.epsilon)
    return made


OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry(_adamw),
    "adamw8bit": Entry(_adamw8bit, "bitsandbytes", "bnb"),
    "adafactor": Entry(_adafactor),
    "sgd": Entry(_sgd),
    "prodigy": Entry(_prodigy, "prodigyopt", "optimizers"),
    "schedulefree-adamw": Entry(_schedulefree, "schedulefree", "optimizers"),
}


def check_installed(name: str) -> Entry:
    """The optimiser ``name``; raises :class:`MissingDependencyError` listing what is there when its package is not."""
    entry = OPTIMIZERS[name]
    if not entry.installed:
        present = ", ".join(other for other, known in OPTIMIZERS.items() if known.installed)
        raise MissingDependencyError(entry.package, entry.extra, f"The optimizer '{name}' (installed: {present})")
    return entry


def make_optimizer(groups: Groups, config: AdapterTrainConfig) -> torch.optim.Optimizer:
    """The configured optimiser over ``groups``.

    Raises:
        MissingDependencyError: its package is not installed; the message lists those that are.
        InputError: prodigy with several learning rates (it estimates one).
    """
    entry = check_installed(config.optimizer)
    if config.optimizer == "prodigy" and len({group["lr"] for group in groups}) > 1:
        raise InputError(
            "Prodigy estimates one learning rate for everything: set text_encoder_learning_rate equal to "
            "learning_rate, and the LoRA+ ratios to 1."
        )
    return entry.make(groups, config)


def parameter_groups(models: dict[str, nn.Module], denoiser: str, config: AdapterTrainConfig) -> Groups:
    """Groups by component and matrix (A, B, other), with the learning rates of LoRA+ (Hayou 2024, arXiv 2402.12354).

    Routers of experts are never decayed, which would make their choices more alike.

    ``denoiser`` is the component that learns at ``learning_rate``; others are text encoders.
    """
    text_rate = getattr(config, "text_encoder_learning_rate", None)
    if text_rate is None:
        text_rate = config.learning_rate if config.optimizer == "prodigy" else config.learning_rate / 2
    groups: Groups = []
    for name, model in models.items():
        rate, ratio = config.learning_rate, config.loraplus_ratio
        if name != denoiser:
            rate, ratio = text_rate, getattr(config, "text_encoder_loraplus_ratio", 1.0)
        parts: dict[str, list[nn.Parameter]] = {"A": [], "B": [], "router": [], "other": []}
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parts[_part(key)].append(parameter)
        groups += [
            {
                "params": members,
                "lr": rate * ratio if part == "B" else rate,
                "weight_decay": 0.0 if part == "router" else config.weight_decay,
                "component": name,
                "part": part,
            }
            for part, members in parts.items()
            if members
        ]
    return groups


def _part(key: str) -> str:
    """Which matrix a parameter is, by its name in the model."""
    if "moeadapter_router" in key:
        return "router"
    match = re.search(r"(?:lora|moeadapter(?:_\w+)?)_([AB])(?:\.|$)", key)
    return match.group(1) if match else "other"


def lr_factor(step: int, total: int, config: AdapterTrainConfig) -> float:
    """Factor on the learning rate at ``step`` (0 .. total): linear warm-up, then the schedule down to min_lr_ratio."""
    warmup = config.warmup_steps or round(config.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    falling: float = {
        "constant": 1.0,
        "linear": 1 - progress,
        "polynomial": (1 - progress) ** config.lr_power,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "cosine-restarts": 0.5 * (1 + math.cos(math.pi * (progress * config.lr_cycles % 1.0))) if progress < 1 else 0.0,
    }[config.lr_schedule]
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * falling


def running_average(parameters: Sequence[nn.Parameter], config: AdapterTrainConfig) -> Any:
    """The running average for ``ema`` (None without), updated by ``step(parameters)``."""
    if not config.ema:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=config.ema_decay, foreach=True)


@contextmanager
def averaged(optimizer: Any, parameters: Sequence[nn.Parameter], average: Any = None) -> Iterator[None]:
    """Inside, the weights are those that are saved: averages of ``average`` (see :func:`running_average`) or of a
    schedule-free optimiser, if any; afterwards, the training weights to the bit."""
    if average is not None:
        average.store(parameters)
        average.copy_to(parameters)
        try:
            yield
        finally:
            average.restore(parameters)
        return
    if not hasattr(optimizer, "eval"):
        yield
        return
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data.copy_(value)
