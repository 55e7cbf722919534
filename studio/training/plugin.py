"""Where a training method joins the loop, independent of the driver.

A method overrides what it needs. Order in one optimiser step: ``step_begin``; per forward pass ``forward_context``
around the forward and ``loss`` after it; after the last backward ``grads_ready`` (reduced, unscaled, not yet
clipped); then clipping, the optimiser, EMA, and ``after_step``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adapters.formats.lora import LoraLayer

Layers = dict[str, dict[str, LoraLayer]]
"""Component -> module path -> layer."""


@dataclass(frozen=True)
class Handles:
    """What the driver gives a plugin: trainable models by component name, and the optimiser once it exists."""

    models: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer | None = None


@dataclass(frozen=True)
class Outputs:
    """One forward pass: prediction and target, the loss per sample, noise levels, how many are not class pictures."""

    prediction: torch.Tensor
    target: torch.Tensor
    losses: torch.Tensor
    times: torch.Tensor
    shown: int


class Plugin:
    """Base of the methods: does nothing."""

    name = ""

    def configure(self, config: Any) -> None:
        """Read the configuration; raise :class:`~adapters.errors.InputError` for what cannot be combined."""

    def before_inject(self, models: Mapping[str, nn.Module]) -> None:
        """The frozen models, before adapters are added."""

    def after_inject(self, handles: Handles) -> None:
        """The models with adapters and the optimiser, before the first step."""

    def step_begin(self, step: int) -> None:
        """An optimiser step begins (counted from 0)."""

    def forward_context(self) -> AbstractContextManager[Any]:
        """Entered around each forward pass of the training loss."""
        return nullcontext()

    def loss(self, loss: torch.Tensor, outputs: Outputs) -> tuple[torch.Tensor, dict[str, float]]:
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

    def before_inject(self, models: Mapping[str, nn.Module]) -> None:
        for plugin in self.plugins:
            plugin.before_inject(models)

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

    def loss(self, loss: torch.Tensor, outputs: Outputs) -> tuple[torch.Tensor, dict[str, float]]:
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
