"""Training at perturbed weights: perturbed from the start of an optimiser step until its gradients are complete.

A method gives each layer a perturbation, which it switches on at the start of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from adapters.errors import InputError
from adapters.layers.variant import attach
from adapters.plugin import Handles, Need, Plugin, check_whole, matrices_of


class SteppedPerturbation(Protocol):
    """The perturbation of one layer, with the number or tensor it keeps between steps (None at first)."""

    memory: Any

    def __call__(self, layer: Any, adapter: str, x: Tensor) -> Tensor | None:
        """e(x), shaped like the layer's output, or None while it is off."""

    def end(self, layer: Any, adapter: str) -> None:
        """Switch off at the end of a step and keep what the next one needs of its gradients."""


class PerturbationPlugin(Plugin):
    """Base of the perturbing methods: which layers, when, and what a checkpoint keeps."""

    name = "perturbation"
    active: Mapping[str, Any]

    def configure(self, config: Any) -> None:
        self.kind, self.every = config.perturb, config.perturb_every

    def needs(self) -> frozenset[Need]:
        return frozenset({"gradients"})

    def make(self, name: str, layer: Any, handles: Handles) -> SteppedPerturbation:
        """A new perturbation for one layer."""
        raise NotImplementedError

    def begin(self, name: str, layer: Any, step: int) -> None:
        """Switch a layer's perturbation on for an optimiser step."""
        raise NotImplementedError

    def after_inject(self, handles: Handles) -> None:
        self.layers, self.adapter = matrices_of(handles), handles.adapter
        check_whole(self.layers, self.adapter, f"perturb '{self.kind}'")
        self.active = {name: self.make(name, layer, handles) for name, layer in self.layers.items()}
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
        kept = {name: perturbation.memory for name, perturbation in self.active.items()}
        cpu = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in kept.items()}
        return {"kind": self.kind, "layers": cpu}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("kind") != self.kind:
            raise InputError(f"The checkpoint was made with perturb '{state.get('kind', 'none')}', not '{self.kind}'.")
        for name, perturbation in self.active.items():
            perturbation.memory = state["layers"].get(name)
