"""Where a training method joins the loop, independent of the driver.

A method overrides what it needs. Before the first step: ``configure``; ``before_inject``; plain adapters are added
(and an adapter to continue from is loaded); ``initialise`` may change how they start and what learns; the optimiser is
made; ``after_inject``; ``load_state_dict`` when a run is resumed. Order in one optimiser step: ``step_begin``; per
forward pass ``forward_context`` around the forward and ``loss`` after it; after the last backward ``grads_ready``
(reduced, unscaled, not yet clipped); then clipping, the optimiser, EMA, and ``after_step``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from adapters.errors import InputError
from adapters.formats.lora import LoraLayer
from adapters.layers.variant import adapted, pair

Layers = dict[str, dict[str, LoraLayer]]
"""Component -> module path -> layer."""


Need = Literal["calibration", "logits", "reference", "gradients", "momenta"]
"""What a plugin asks of the driver: a look at batches before the first step; logits in the outputs; the untouched
model's logits; gradients of the whole step in ``.grad``; an optimiser with plain momenta."""

Closure = Callable[[], torch.Tensor]
"""Computes the mean loss of one batch, with gradients."""


@dataclass(frozen=True)
class Calibration:
    """A look at the data before the first step.

    ``losses(n)`` yields the training loss of the first n batches of the run, one closure each. The models are in
    evaluation mode, their adapters still change nothing, and neither the run's data order nor its random numbers move.
    ``rate`` is the learning rate of the first step.
    """

    losses: Callable[[int], Iterator[Closure]]
    rate: float = 0.0


@dataclass(frozen=True)
class Handles:
    """What the driver gives a plugin.

    Attributes:
        models: models with adapters by component name.
        optimizer: the (unwrapped) optimiser, once it exists.
        calibration: for ``initialise``, if a plugin needs it; None when the run is resumed.
        steps: optimiser steps of the whole run, 0 where unknown.
        seed: of the run.
        adapter: name of the adapter inside the models.
    """

    models: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer | None = None
    calibration: Calibration | None = None
    steps: int = 0
    seed: int = 0
    adapter: str = "default"


@dataclass(frozen=True)
class Outputs:
    """One forward pass: prediction and target, the loss per sample, noise levels, how many are not class pictures."""

    prediction: torch.Tensor
    target: torch.Tensor
    losses: torch.Tensor
    times: torch.Tensor
    shown: int


@dataclass(frozen=True)
class Answers:
    """One forward pass of a model that gives logits.

    Attributes:
        logits: (batch, length, vocabulary), or (batch, classes).
        labels: (batch, length) with -100 for what does not count, not shifted; or (batch,).
        reference: the untouched base model's logits of the same inputs, computed when called, without gradients,
            with adapter, dropout and perturbation off.
        share: valid labels of this pass over those of the whole optimiser step (1 without accumulation); what a plugin
            adds to the loss is multiplied by it.
        shifted: logit t belongs to label t + 1 (causal language models).
    """

    logits: torch.Tensor
    labels: torch.Tensor
    reference: Callable[[], torch.Tensor]
    share: float = 1.0
    shifted: bool = True


class Plugin:
    """Base of the methods: does nothing."""

    name = ""

    def configure(self, config: Any) -> None:
        """Read the configuration; raise :class:`~adapters.errors.InputError` for what cannot be combined."""

    def needs(self) -> frozenset[Need]:
        """What the driver must provide."""
        return frozenset()

    def before_inject(self, models: Mapping[str, nn.Module]) -> None:
        """The frozen models, before adapters are added."""

    def initialise(self, handles: Handles) -> None:
        """The models with plain adapters, before the optimiser: set how they start and what learns."""

    def after_inject(self, handles: Handles) -> None:
        """The models with adapters and the optimiser, before the first step."""

    def step_begin(self, step: int) -> None:
        """An optimiser step begins (counted from 0)."""

    def forward_context(self) -> AbstractContextManager[Any]:
        """Entered around each forward pass of the training loss."""
        return nullcontext()

    def loss(self, loss: torch.Tensor, outputs: Outputs | Answers) -> tuple[torch.Tensor, dict[str, float]]:
        """Change the loss of one forward pass; numbers in the second part are logged."""
        return loss, {}

    def grads_ready(self, step: int) -> None:
        """All gradients of the step are in ``.grad``."""

    def after_step(self, step: int) -> None:
        """The optimiser has stepped."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""

    def finalize(self, layers: Layers) -> Layers:
        """Change the adapter (component -> module -> layer) before it is saved as an ordinary LoRA."""
        return layers


class Plugins:
    """Several plugins as one, called in order."""

    def __init__(self, plugins: Sequence[Plugin] = ()) -> None:
        self.plugins = list(plugins)

    def configure(self, config: Any) -> None:
        for plugin in self.plugins:
            plugin.configure(config)

    def needs(self) -> frozenset[Need]:
        return frozenset().union(*(plugin.needs() for plugin in self.plugins))

    def before_inject(self, models: Mapping[str, nn.Module]) -> None:
        for plugin in self.plugins:
            plugin.before_inject(models)

    def initialise(self, handles: Handles) -> None:
        for plugin in self.plugins:
            plugin.initialise(handles)

    def after_inject(self, handles: Handles) -> None:
        for plugin in self.plugins:
            plugin.after_inject(handles)

    def step_begin(self, step: int) -> None:
        for plugin in self.plugins:
            plugin.step_begin(step)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with ExitStack() as stack:
            for plugin in self.plugins:
                stack.enter_context(plugin.forward_context())
            yield

    def loss(self, loss: torch.Tensor, outputs: Outputs | Answers) -> tuple[torch.Tensor, dict[str, float]]:
        logs: dict[str, float] = {}
        for plugin in self.plugins:
            loss, more = plugin.loss(loss, outputs)
            logs |= more
        return loss, logs

    def grads_ready(self, step: int) -> None:
        for plugin in self.plugins:
            plugin.grads_ready(step)

    def after_step(self, step: int) -> None:
        for plugin in self.plugins:
            plugin.after_step(step)

    def state_dict(self) -> dict[str, Any]:
        return {plugin.name: plugin.state_dict() for plugin in self.plugins}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for plugin in self.plugins:
            plugin.load_state_dict(state.get(plugin.name, {}))

    def finalize(self, layers: Layers) -> Layers:
        for plugin in self.plugins:
            layers = plugin.finalize(layers)
        return layers


# ------------------------------------------------------------------------------------------------ for plugins


def layers_of(handles: Handles) -> dict[str, Any]:
    """Adapted PEFT layers as "component.module path" -> layer."""
    return {
        f"{component}.{name}": layer
        for component, model in handles.models.items()
        for name, layer in adapted(model, handles.adapter).items()
    }


def matrices_of(handles: Handles) -> dict[str, Any]:
    """Adapted linear layers and convolutions (adapters of embeddings stay plain)."""
    found = {name: layer for name, layer in layers_of(handles).items() if handles.adapter in layer.lora_A}
    if not found:
        raise InputError("The models have no adapter layers that learn by this method.")
    return found


def check_whole(layers: Mapping[str, Any], adapter: str, method: str) -> None:
    """Refuse parameters that are split over processes: row norms of a piece mean nothing."""
    for layer in layers.values():
        for parameter in pair(layer, adapter):
            if hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh") or parameter.ndim < 2:
                raise InputError(
                    f"{method} needs whole matrices, but this launch splits parameters over processes "
                    "(FSDP or ZeRO-3): use DDP or ZeRO-2."
                )


def no_decay(handles: Handles, parameters: Sequence[torch.Tensor]) -> None:
    """No weight decay in the optimiser's groups that hold nothing but these."""
    if handles.optimizer is None or not parameters:
        return
    chosen = {id(parameter) for parameter in parameters}
    for group in handles.optimizer.param_groups:
        if group["params"] and all(id(parameter) in chosen for parameter in group["params"]):
            group["weight_decay"] = 0.0
