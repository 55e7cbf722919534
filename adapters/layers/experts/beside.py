"""A mixture of experts beside a loaded model, which is its own self outside of a context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.layers.experts.config import MoeConfig
from adapters.layers.experts.files import load
from adapters.layers.experts.layer import ExpertLayer
from adapters.layers.experts.model import expert_layers
from adapters.layers.experts.routing import Routing, routing_of

ADAPTER = "default"


class ExpertsBeside:
    """The mixture at ``path``, made for ``model``.

    Hooks on the model's own modules stay where they are, so that other adapters act together with it.

    Raises:
        InputError: it cannot be read, or was made for another base.
    """

    def __init__(self, model: Any, path: Path) -> None:
        self.model = model
        self.layers: dict[str, ExpertLayer] = {}
        try:
            with torch.no_grad():
                self.config: MoeConfig = load(model, path, ADAPTER)
        finally:  # the model is itself again, also when the file turns out not to fit
            self.layers = expert_layers(model)
            if self.layers:
                self.routing: Routing = routing_of(model)
                self._detach()
            if hasattr(model, "peft_config"):
                del model.peft_config
        for layer in self.layers.values():
            layer.eval().requires_grad_(False)

    @contextmanager
    def active(self) -> Iterator[Routing]:
        """Inside, the model computes with the experts; yields their context."""
        for path, layer in self.layers.items():
            _put(self.model, path, layer)
        self.routing.attach(self.model)
        try:
            yield self.routing
        finally:
            self._detach()

    def _detach(self) -> None:
        for path, layer in self.layers.items():
            _put(self.model, path, layer.get_base_layer())
        self.routing.detach()


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
