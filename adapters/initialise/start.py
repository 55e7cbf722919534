"""Apply an initialisation to plain, freshly added adapters.

An initialisation is a function of one layer, ``start(layer: StartLayer, **options)`` with the options its method
declares; the declaration also says what it measures and what it returns (:class:`adapters.options.Training`):

    factors   A (r, in), B (out, r)
    offset    the same, also kept frozen and subtracted: the model does not change
    core      A (r, in), B (out, r), R (r, r): A and B frozen, R between them trained

The adapters must still change nothing (B = 0), so that the pre-trained model is measured. A data-driven initialisation
that moves the model is bounded: while the loss on its batches exceeds the base's by more than :data:`WORSE`, its step
is halved.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adapters import catalogue
from adapters.errors import InputError
from adapters.initialise.statistics import Closure, capture_gradients, capture_moments
from adapters.layers.variant import (
    base_weight,
    core_of,
    offset_of,
    pair,
    set_core,
    set_offset,
    set_offset_buffers,
)
from adapters.options import Training
from adapters.plugin import Handles, Need, Plugin, layers_of, no_decay

Losses = Callable[[int], Iterable[Closure]]
"""The training losses of the first n batches, one closure each."""

WORSE = 0.1
"""Largest increase of the loss by an initialisation, as a share of the base's loss."""

HALVINGS = 30
"""How often a step is halved before the initialisation is refused."""


@dataclass(frozen=True)
class StartLayer:
    """What an initialisation gets of one layer.

    Attributes:
        W0: the frozen weight (out, in * kernel), fp32 or more precise.
        measured: mean gradient (out, in * kernel) or second moment (in * kernel, in * kernel), by the method's
            ``looks_at``; else empty.
        rank: r.
        scale: s, the forward factor.
        seed: of the run.
        rate: learning rate of the first optimiser step.
        low_rank: A (r, in) and B (out, r), with s = 1, that a compressed base has beside its few-bit weight; W0 is
            the sum.
    """

    W0: Tensor
    measured: Tensor
    rank: int
    scale: float
    seed: int = 0
    rate: float = 0.0
    low_rank: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Start:
    """An initialisation: its name, how many batches it measures, and its options by name (missing ones: defaults)."""

    name: str
    batches: int = 8
    options: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 0.0
    seed: int = 0

    @property
    def training(self) -> Training:
        """The method's declaration."""
        found = catalogue.find("initialise", self.name).training
        if found is None:
            raise InputError(f"'{self.name}' is not an initialisation for training.")
        return found

    @property
    def looks(self) -> bool:
        """Whether it needs batches."""
        return self.training.looks_at != "nothing"

    def factors(self, layer: StartLayer) -> tuple[Tensor, ...]:
        """A, B (and R) of a layer, from the method's function."""
        function: Any = catalogue.find("initialise", self.name).load()
        options = {item.name: self.options.get(item.name, item.default) for item in self.training.options}
        found: tuple[Tensor, ...] = function(layer, **options)
        return found


def apply(
    start: Start, models: Mapping[str, nn.Module], losses: Losses | None = None, adapter: str = "default"
) -> None:
    """Set A, B (and offsets, R) of every adapted layer of ``models``.

    Args:
        models: component name -> model with a plain adapter; for a data-driven initialisation, all of them take part in
            the losses.
        losses: needed by data-driven initialisations.

    Raises:
        InputError: a layer that cannot be initialised (named), missing batches, or a loss that stays worse than the
            base's however short the step.
    """
    if start.training.sets == "nothing":
        return  # PEFT has already done it
    layers = layers_of(Handles(models, adapter=adapter))
    seen: list[float] = []
    measured = _measure(start, models, layers, losses, seen)
    for name, layer in layers.items():
        try:
            _set(start, layer, measured.get(name), adapter)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    if losses is not None and seen and start.training.sets != "offset":
        _bound(start, models, list(layers.values()), losses, _shared_mean(seen, layers), adapter)


def _measure(
    start: Start, models: Mapping[str, nn.Module], layers: Mapping[str, Any], losses: Losses | None, seen: list[float]
) -> dict[str, Tensor]:
    """Layer -> its mean gradient or second moment; the batches' losses are appended to ``seen``."""
    if not start.looks:
        return {}
    if losses is None:
        raise InputError(f"init '{start.name}' needs batches to measure first, but none were given.")
    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    looks_at, batches = start.training.looks_at, _recorded(losses(start.batches), seen)
    with _evaluating(models):
        if looks_at == "gradients":
            found = capture_gradients(bases, batches, start.batches)
        else:
            found = capture_moments(bases, batches, start.batches, scaled=looks_at == "scaled moments")
    batches.close()
    for model in models.values():
        for parameter in model.parameters():
            parameter.grad = None
    return {name: _over_processes(value, bases[name]) for name, value in found.items()}


@torch.no_grad()
def _set(start: Start, layer: Any, measured: Tensor | None, adapter: str) -> None:
    W0 = base_weight(layer)
    W0 = W0.to(torch.promote_types(W0.dtype, torch.float32))
    seen = torch.empty(0) if measured is None else measured.to(W0)
    known = StartLayer(W0, seen, layer.r[adapter], layer.scaling[adapter], start.seed, start.rate,
                       getattr(layer.get_base_layer(), "low_rank", None))  # fmt: skip
    A, B, *core = (_same_everywhere(tensor) for tensor in start.factors(known))
    if start.training.sets == "offset":
        set_offset(layer, A, B, adapter)
        return
    down, up = pair(layer, adapter)
    down.copy_(A.reshape(down.shape))
    up.copy_(B.reshape(up.shape))
    if start.training.sets == "core":
        set_core(layer, core[0], adapter)


# ------------------------------------------------------------------------------------------------ bounding the step


@torch.no_grad()
def _bound(
    start: Start, models: Mapping[str, nn.Module], layers: list[Any], losses: Losses, base: float, adapter: str
) -> None:
    """Halve the step until the loss exceeds ``base`` by at most :data:`WORSE`; warn if it was halved."""
    moved = [_step_matrix(layer, adapter) for layer in layers]
    if not any(bool(tensor.any()) for tensor in moved):
        return
    first = loss = _loss(start, models, losses, layers)
    halvings = 0
    while not loss <= base + WORSE * abs(base) and halvings < HALVINGS:
        for tensor in moved:
            tensor.div_(2)
        loss, halvings = _loss(start, models, losses, layers), halvings + 1
    if not loss <= base + WORSE * abs(base):
        raise InputError(
            f"init '{start.name}' raises the loss from {base:.3g} to {first:.3g}, and still too far however short its "
            "step: lower learning_rate, raise init_batches, or choose another init."
        )
    if halvings:
        warnings.warn(
            f"init '{start.name}' raised the loss from {base:.3g} to {first:.3g}: its step was shortened to "
            f"1/{2**halvings}, which gives {loss:.3g}.",
            stacklevel=2,
        )


def _step_matrix(layer: Any, adapter: str) -> Tensor:
    """The matrix that scales the update: the core, or B."""
    core = core_of(layer, adapter)
    return pair(layer, adapter)[1] if core is None else core


def _loss(start: Start, models: Mapping[str, nn.Module], losses: Losses, layers: list[Any]) -> float:
    """Mean loss of the measured batches, over all processes."""
    with _evaluating(models):
        return _shared_mean([float(closure()) for closure in losses(start.batches)], dict(enumerate(layers)))


def _shared_mean(values: list[float], layers: Mapping[Any, Any]) -> float:
    mean = torch.tensor(sum(values) / len(values), dtype=torch.float64)
    return float(_over_processes(mean.float(), next(iter(layers.values())))) if _together() else float(mean)


def _recorded(losses: Iterable[Closure], seen: list[float]) -> Any:
    """The closures; their values are also appended to ``seen``."""

    def recorded(closure: Closure) -> Closure:
        def loss() -> Tensor:
            value = closure()
            seen.append(float(value.detach()))
            return value

        return loss

    return (recorded(closure) for closure in losses)


# ------------------------------------------------------------------------------------------------ the models


@contextmanager
def _evaluating(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the models are in evaluation mode; every module's mode is restored on exit."""
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    for model in models.values():
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _together() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized()


def _over_processes(value: Tensor, layer: nn.Module) -> Tensor:
    """The mean over all processes that train together."""
    if not _together():
        return value
    device = next(layer.parameters()).device
    shared = value.to(device)
    dist.all_reduce(shared)
    return shared.cpu() / dist.get_world_size()


def _same_everywhere(value: Tensor) -> Tensor:
    """The first process's tensor: decompositions may differ in sign between machines."""
    if _together():
        value = value.contiguous()
        dist.broadcast(value, 0)
    return value


# ------------------------------------------------------------------------------------------------ in a training


class StartPlugin(Plugin):
    """Applies the chosen initialisation before the first step; checkpoints hold what it freezes."""

    name = "start"

    def configure(self, config: Any) -> None:
        chosen = Start(config.init)
        options = {item.name: getattr(config, item.name) for item in chosen.training.options}
        self.start = Start(config.init, config.init_batches, options, seed=config.seed)

    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"}) if self.start.looks else frozenset()

    def initialise(self, handles: Handles) -> None:
        self.layers, self.adapter = layers_of(handles), handles.adapter
        start, look = self.start, handles.calibration
        if look is not None:
            start = Start(start.name, start.batches, start.options, look.rate, start.seed)
        elif start.looks:  # the run is resumed: the factors come with its state
            if start.training.sets == "core":
                for layer in self.layers.values():
                    rank = layer.r[self.adapter]
                    set_core(layer, torch.zeros(rank, rank), self.adapter)
            return
        apply(start, handles.models, None if look is None else look.losses, self.adapter)

    def after_inject(self, handles: Handles) -> None:
        cores = [core for layer in self.layers.values() if (core := core_of(layer, self.adapter)) is not None]
        no_decay(handles, cores)  # decay would pull towards W0, not towards the start

    def state_dict(self) -> dict[str, Any]:
        kept = {}
        for name, layer in self.layers.items():
            frozen = offset_of(layer, self.adapter)
            if core_of(layer, self.adapter) is not None:
                frozen = pair(layer, self.adapter)
            if frozen is not None:
                kept[name] = [tensor.detach().cpu().clone() for tensor in frozen]
        return {"init": self.start.name, "frozen": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("init") != self.start.name:
            raise InputError(
                f"The checkpoint was not initialised with '{self.start.name}' (no frozen matrices): start a new run."
            )
        sets = self.start.training.sets
        for name, layer in self.layers.items() if sets in ("offset", "core") else ():
            if name not in state["frozen"]:
                raise InputError(f"The checkpoint has no frozen matrices for the layer '{name}': start a new run.")
            first, second = state["frozen"][name]
            if sets == "offset":
                set_offset_buffers(layer, first, second, self.adapter)
                continue
            with torch.no_grad():
                down, up = pair(layer, self.adapter)
                down.copy_(first)
                up.copy_(second)
