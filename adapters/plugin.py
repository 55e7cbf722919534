"""The hooks by which a training method takes part in the loop, independent of the driver.

A method overrides what it needs. Before the first step: ``configure``; ``before_inject``; plain adapters are added
(and an adapter to continue from is loaded); ``initialise`` may change their values and what is trained; the optimiser
is created; ``after_inject``; ``load_state_dict`` if a run is resumed. Order in one optimiser step: ``step_begin``; per
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
"""What a plugin needs from the driver: batches to measure before the first step; logits in the outputs; the base
model's logits; gradients of the whole step in ``.grad``; an optimiser with plain momenta."""

Closure = Callable[[], torch.Tensor]
"""Computes the mean loss of one batch, with gradients."""


@dataclass(frozen=True)
class Calibration:
    """Access to the data before the first step.

    ``losses(n)`` yields the training losses of the first n batches of the run, one closure each. The models are in
    evaluation mode, their adapters still change nothing, and neither the run's data order nor its random numbers
    advance. ``rate`` is the learning rate of the first step.
    """

    losses: Callable[[int], Iterator[Closure]]
    rate: float = 0.0


@dataclass(frozen=True)
class Handles:
    """What the driver gives a plugin.

    Attributes:
        models: component name -> model with adapters.
        optimizer: the (unwrapped) optimiser, once it exists.
        calibration: for ``initialise``, if a plugin needs it; None if the run is resumed.
        steps: optimiser steps of the whole run; 0 = unknown.
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
    """One forward pass of a denoiser.

    Attributes:
        prediction, target: of the same shape, batch first.
        losses: loss per sample (batch,).
        times: noise levels (batch,).
        shown: number of samples that are not class pictures (prior preservation); they come first.
    """

    prediction: torch.Tensor
    target: torch.Tensor
    losses: torch.Tensor
    times: torch.Tensor
    shown: int


@dataclass(frozen=True)
class Answers:
    """One forward pass of a model with logits.

    Attributes:
        logits: (batch, length, vocabulary), or (batch, classes).
        labels: (batch, length), not shifted, -100 where none counts; or (batch,).
        reference: computes the base model's logits for the same inputs, without gradients, with adapter, dropout and
            perturbation off.
        share: valid labels of this pass over those of the whole optimiser step (1 without accumulation); a plugin
            multiplies what it adds to the loss by it.
        shifted: logit t predicts label t + 1 (causal language models).
    """

    logits: torch.Tensor
    labels: torch.Tensor
    reference: Callable[[], torch.Tensor]
    share: float = 1.0
    shifted: bool = True


class Plugin:
    """Base class of training methods; every hook does nothing."""

    name = ""

    def configure(self, config: Any) -> None:
        """Read the configuration; raise :class:`~adapters.errors.InputError` for settings that do not combine."""

    def needs(self) -> frozenset[Need]:
        """What the driver must provide."""
        return frozenset()

    def batches(self, samples: int, size: int, steps: int) -> list[list[int]] | None:
        """Numbers of the samples of every step, or None for the driver's own order (batches of ``size``)."""
        return None

    def before_inject(self, models: Mapping[str, nn.Module]) -> None:
        """Called with the frozen models, before adapters are added."""

    def initialise(self, handles: Handles) -> None:
        """Called with plain adapters, before the optimiser: set their initial values and what is trained."""

    def after_inject(self, handles: Handles) -> None:
        """Called with adapters and optimiser, before the first step."""

    def step_begin(self, step: int) -> None:
        """Called at the start of optimiser step ``step`` (from 0)."""

    def forward_context(self) -> AbstractContextManager[Any]:
        """A context entered around each forward pass of the training loss."""
        return nullcontext()

    def loss(self, loss: torch.Tensor, outputs: Outputs | Answers) -> tuple[torch.Tensor, dict[str, float]]:
        """The (changed) loss of one forward pass, and values to log by name."""
        return loss, {}

    def grads_ready(self, step: int) -> None:
        """Called when all gradients of the step are in ``.grad``."""

    def after_step(self, step: int) -> None:
        """Called after the optimiser's step."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""

    def beside(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Files to write beside the adapter: name -> tensors."""
        return {}

    def recorded(self) -> Mapping[str, Any]:
        """Entries of the recipe on the training, besides the configuration."""
        return {}

    def texts_beside(self) -> Mapping[str, str]:
        """Text files to write beside the adapter: name -> text."""
        return {}

    def finalize(self, layers: Layers) -> Layers:
        """Change the adapter (component -> module -> layer) before it is saved as an ordinary LoRA."""
        return layers


class Plugins:
    """Several plugins called in order, as one."""

    def __init__(self, plugins: Sequence[Plugin] = ()) -> None:
        self.plugins = list(plugins)

    def configure(self, config: Any) -> None:
        for plugin in self.plugins:
            plugin.configure(config)

    def needs(self) -> frozenset[Need]:
        return frozenset().union(*(plugin.needs() for plugin in self.plugins))

    def batches(self, samples: int, size: int, steps: int) -> list[list[int]] | None:
        chosen = [found for plugin in self.plugins if (found := plugin.batches(samples, size, steps)) is not None]
        if len(chosen) > 1:
            raise InputError("Two training methods choose the samples of each step: use one of them.")
        return chosen[0] if chosen else None

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

    def beside(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        return {name: tensors for plugin in self.plugins for name, tensors in plugin.beside().items()}

    def recorded(self) -> Mapping[str, Any]:
        return {name: value for plugin in self.plugins for name, value in plugin.recorded().items()}

    def texts_beside(self) -> Mapping[str, str]:
        return {name: text for plugin in self.plugins for name, text in plugin.texts_beside().items()}

    def finalize(self, layers: Layers) -> Layers:
        for plugin in self.plugins:
            layers = plugin.finalize(layers)
        return layers


# ------------------------------------------------------------------------------------------------ for plugins


def layers_of(handles: Handles) -> dict[str, Any]:
    """ "component.module path" -> adapted PEFT layer."""
    return {
        f"{component}.{name}": layer
        for component, model in handles.models.items()
        for name, layer in adapted(model, handles.adapter).items()
    }


def matrices_of(handles: Handles) -> dict[str, Any]:
    """Like :func:`layers_of`, without embeddings; raises :class:`InputError` if nothing is left."""
    found = {name: layer for name, layer in layers_of(handles).items() if handles.adapter in layer.lora_A}
    if not found:
        raise InputError("The models have no adapted linear layers or convolutions, which this method needs.")
    return found


def check_whole(layers: Mapping[str, Any], adapter: str, method: str) -> None:
    """Raise :class:`InputError` for parameters sharded over processes, whose row norms cannot be computed."""
    for layer in layers.values():
        for parameter in pair(layer, adapter):
            if hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh") or parameter.ndim < 2:
                raise InputError(
                    f"{method} needs whole matrices, but this launch shards parameters over processes (FSDP or "
                    "ZeRO-3): use DDP or ZeRO-2."
                )


def no_decay(handles: Handles, parameters: Sequence[torch.Tensor]) -> None:
    """Set weight decay to 0 in the optimiser's groups that hold only ``parameters``."""
    if handles.optimizer is None or not parameters:
        return
    chosen = {id(parameter) for parameter in parameters}
    for group in handles.optimizer.param_groups:
        if group["params"] and all(id(parameter) in chosen for parameter in group["params"]):
            group["weight_decay"] = 0.0
