"""How a generator of LoRAs is trained (:mod:`adapters.generation.icm_lora`); read without loading torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from adapters.errors import InputError

Arch = Literal["mlp", "conv"]
Gauge = Literal["none", "balanced", "aligned"]
Normalise = Literal["dataset", "reference"]

LEAST_ROWS = 8
"""Fewest rows of a batch with batch normalisation; 2 as in the authors' program make evaluation unlike training."""


@dataclass(frozen=True)
class Settings:
    """How a generator is trained.

    Attributes:
        arch: layout of the network.
        latent: width of z.
        hidden: width of ``mlp``'s hidden layers.
        kld_weight: weight of the KL term.
        free_bits: nats per entry of z below which its KL costs nothing.
        warm_up: steps over which the weight rises from 0.
        normalise: "dataset" or "reference" statistics.
        gauge: what the terms of a layer are brought to.
        steps, batch, learning_rate: of AdamW, with a cosine schedule.
        seed: of the network, the batches and the noise.
        single_task: allow one task only, which no condition can tell from others.
    """

    arch: Arch = "mlp"
    latent: int = 32
    hidden: int = 256
    kld_weight: float = 0.005
    free_bits: float = 0.0
    warm_up: int = 0
    normalise: Normalise = "dataset"
    gauge: Gauge = "aligned"
    steps: int = 400
    batch: int = 16
    learning_rate: float = 1e-3
    seed: int = 0
    single_task: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("arch", Arch), ("normalise", Normalise), ("gauge", Gauge)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(f"{name} must be one of {', '.join(get_args(kind))}, got '{getattr(self, name)}'.")
        for name, least in (("latent", 1), ("hidden", 1), ("steps", 1), ("batch", 2), ("warm_up", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be {least} or more, got {getattr(self, name)}.")
        if self.arch == "conv" and self.batch < LEAST_ROWS:
            raise InputError(
                f"batch must be {LEAST_ROWS} or more with arch 'conv', whose batch normalisation learns its statistics "
                f"from so few rows badly, got {self.batch}."
            )
        for name in ("kld_weight", "free_bits", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0) or (name == "learning_rate" and value == 0):
                raise InputError(f"{name} must be a finite number, not negative, got {value}.")
