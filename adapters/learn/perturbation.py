"""Training at disturbed weights: on from an optimiser step's begin until its gradients are in.

A method gives each layer its disturbance, which is off until it begins and ends with the step's gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from adapters.errors import InputError
from adapters.layers.variant import attach
from adapters.plugin import Handles, Need, Plugin, check_whole, matrices_of


class Disturbance(Protocol):
    """The perturbation of one layer, and the number or tensor it remembers from step to step (None at first)."""

    memory: Any

    def __call__(self, layer: Any, adapter: str, x: Tensor) -> Tensor | None:
        """e(x), shaped like the layer's output, or None while it is off."""

    def end(self, layer: Any, adapter: str) -> None:
        """Gradients are in: remember, and be off."""


class PerturbationPlugin(Plugin):
    """Base of the methods: which layers, when, and what a checkpoint keeps."""

    name = "perturbation"
    active: Mapping[str, Any]

    def configure(self, config: Any) -> None:
        self.kind, self.every = config.perturb, config.perturb_every

    def needs(self) -> frozenset[Need]:
        return frozenset({"gradients"})

    def disturbance(self, name: str, layer: Any, handles: Handles) -> Disturbance:
        """The disturbance of one layer."""
        raise NotImplementedError

    def begin(self, name: str, layer: Any, step: int) -> None:
        """Switch a layer's disturbance on for an optimiser step."""
        raise NotImplementedError

    def after_inject(self, handles: Handles) -> None:
        self.layers, self.adapter = matrices_of(handles), handles.adapter
        check_whole(self.layers, self.adapter, f"perturb '{self.kind}'")
        self.active = {name: self.disturbance(name, layer, handles) for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            attach(layer, self.adapter).perturbation = self.active[name]

    def step_begin(self, step: int) -> None:
        if step % self.every:
            return
        for name, layer in self.layers.items():
            self.begin(name, layer, step)

    def grads_ready(self, step: int) -> None:
        for name, layer in self.layers.items():
            self.active[name].end(layer, self.adapter)

    def state_dict(self) -> dict[str, Any]:
        kept = {name: disturbance.memory for name, disturbance in self.active.items()}
        cpu = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in kept.items()}
        return {"kind": self.kind, "layers": cpu}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("kind") != self.kind:
            raise InputError(f"The checkpoint was made with perturb '{state.get('kind', 'none')}', not '{self.kind}'.")
        for name, disturbance in self.active.items():
            disturbance.memory = state["layers"].get(name)
