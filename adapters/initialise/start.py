"""Give the plain, freshly added adapters of some models another start.

The adapters must still change nothing (B = 0), so that what is measured is the pre-trained model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adapters.errors import InputError
from adapters.initialise.corda import corda_factors
from adapters.initialise.eva import eva_factor
from adapters.initialise.lora_ga import ga_factors
from adapters.initialise.lora_sb import sb_factors
from adapters.initialise.olora import olora_factors
from adapters.initialise.pissa import pissa_factors
from adapters.initialise.statistics import Closure, capture_gradients, capture_moments
from adapters.layers.variant import adapted, base_weight, pair, set_core, set_offset

Losses = Callable[[int], Iterable[Closure]]
"""The training loss of the first n batches, one closure each."""

GRADIENTS = ("lora_ga", "lora_sb")
MOMENTS = ("eva", "corda")
PLAIN = ("default", "gaussian", "orthogonal")


@dataclass(frozen=True)
class Start:
    """Which start, and its options (see the methods' own modules)."""

    name: str
    batches: int = 8
    gamma: float = 16.0
    direction: str = "ArB2r"
    size: str = "stable"
    norm_clip: bool = False
    mode: str = "ipm"
    eta: float = 0.0
    seed: int = 0

    @property
    def looks(self) -> bool:
        """Whether it needs some batches."""
        return self.name in GRADIENTS + MOMENTS


def apply(
    start: Start, models: Mapping[str, nn.Module], losses: Losses | None = None, adapter: str = "default"
) -> None:
    """Set A, B (and offsets, R) of every adapted layer of ``models``.

    Args:
        models: component name -> model with a plain adapter; with a data-driven start, all of them take part in the
            losses.
        losses: needed by data-driven starts.

    Raises:
        InputError: a layer the start cannot work with (named), or batches that are missing.
    """
    if start.name in PLAIN:
        return  # PEFT has done it
    layers = {
        f"{component}.{name}": layer
        for component, model in models.items()
        for name, layer in adapted(model, adapter).items()
    }
    measured = _measure(start, models, layers, losses)
    for name, layer in layers.items():
        try:
            _set(start, layer, measured.get(name), adapter)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


def _measure(
    start: Start, models: Mapping[str, nn.Module], layers: Mapping[str, Any], losses: Losses | None
) -> dict[str, Tensor]:
    if not start.looks:
        return {}
    if losses is None:
        raise InputError(f"The start '{start.name}' looks at some batches first, and none were given.")
    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    with _evaluating(models):
        if start.name in GRADIENTS:
            found = capture_gradients(bases, losses(start.batches), start.batches)
        else:
            found = capture_moments(bases, losses(start.batches), start.batches, scaled=start.name == "corda")
    for model in models.values():
        for parameter in model.parameters():
            parameter.grad = None
    return {name: _over_processes(value, bases[name]) for name, value in found.items()}


@torch.no_grad()
def _set(start: Start, layer: Any, measured: Tensor | None, adapter: str) -> None:
    rank, scale = layer.r[adapter], layer.scaling[adapter]
    W0 = base_weight(layer)
    W0 = W0.to(torch.promote_types(W0.dtype, torch.float32))
    seen = torch.empty(0) if measured is None else measured.to(W0)
    if start.name == "lora_sb":
        A, B, R = (_same_everywhere(t) for t in sb_factors(seen, rank, scale, start.eta, seed=start.seed))
        down, up = pair(layer, adapter)
        down.copy_(A.reshape(down.shape))
        up.copy_(B.reshape(up.shape))
        set_core(layer, R, adapter)
        return
    if start.name == "eva":
        down, _ = pair(layer, adapter)
        down.copy_(_same_everywhere(eva_factor(seen, rank)).reshape(down.shape))
        return
    if start.name == "pissa":
        A, B = pissa_factors(W0, rank, scale, start.seed)
    elif start.name == "olora":
        A, B = olora_factors(W0, rank)
    elif start.name == "corda":
        A, B = corda_factors(W0, seen, rank, scale, start.mode)
    elif start.name == "lora_ga":
        A, B = ga_factors(seen, rank, scale, start.gamma, start.direction, start.size, W0, start.norm_clip, start.seed)
    else:
        raise InputError(f"There is no start '{start.name}'.")
    set_offset(layer, _same_everywhere(A), _same_everywhere(B), adapter)


@contextmanager
def _evaluating(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the models are in evaluation mode; outside, every module is as it was."""
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    for model in models.values():
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _over_processes(value: Tensor, layer: nn.Module) -> Tensor:
    """The mean over all processes that train together."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    device = next(layer.parameters()).device
    shared = value.to(device)
    dist.all_reduce(shared)
    return shared.cpu() / dist.get_world_size()


def _same_everywhere(value: Tensor) -> Tensor:
    """The first process's tensor: decompositions may differ in sign between machines."""
    if dist.is_available() and dist.is_initialized():
        value = value.contiguous()
        dist.broadcast(value, 0)
    return value
