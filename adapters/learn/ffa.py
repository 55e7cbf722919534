"""FFA-LoRA: Improving LoRA in Privacy-preserving Federated Learning, arXiv 2403.12313 (ICLR 2024).

    y = W0 x + s B A0 x,   A0 drawn once and frozen, B (zero at first) trained

Half the parameters. Averages are exact, sum_k p_k B_k A0 = (sum_k p_k B_k) A0, the update is linear in noise on B, and
the loss is s^2 L |A0|^2-smooth in B. Because s only rescales B, tune the learning rate and leave alpha alone. Trained:
B. Stored: an ordinary LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.layers.variant import adapted, freeze, pair
from adapters.options import Option, Rule, Training
from adapters.plugin import Handles, Plugin, layers_of

METHOD = Method(
    name="ffa",
    title="FFA-LoRA",
    summary="Freezes A and trains only B: half the parameters, exact averages, more stable under noise.",
    stage="learn",
    makes="ordinary LoRA",
    paper="FFA-LoRA, arXiv 2403.12313",
    entry="adapters.learn.ffa:FreezePlugin",
    training=Training(
        key="freeze_a",
        options=(
            Option(
                "freeze_a",
                False,
                help="Train B only (FFA-LoRA): half the parameters, and averages of several adapters are exact.",
                advanced=False,
            ),
        ),
        warned=(
            Rule(
                "init in ('default', 'gaussian')",
                "With A frozen at random directions, training is slower: a higher learning rate or rank makes up for "
                "it.",
            ),
        ),
    ),
)


def freeze_a(model: nn.Module, adapter: str = "default") -> None:
    """Freeze every A of ``model``, also when adapters are switched. Call before the optimiser is created.

    Raises:
        InputError: an adapted embedding, or an A below full rank, whose lost directions B could never learn.
    """
    for name, layer in adapted(model, adapter).items():
        if adapter not in layer.lora_A:
            raise InputError(f"'{name}' is an embedding, whose A cannot be frozen alone: leave it out of the targets.")
        A = pair(layer, adapter)[0].detach().float().flatten(1)
        values = torch.linalg.svdvals(A)
        if not float(values[-1]) > 1e-6 * float(values[0]):
            raise InputError(f"A of '{name}' has less than its full rank {A.shape[0]}: initialise it at random.")
        freeze(layer, "lora_A", adapter)


class FreezePlugin(Plugin):
    """FFA-LoRA: A is frozen."""

    name = "freeze"

    def initialise(self, handles: Handles) -> None:
        self.layers, self.adapter = layers_of(handles), handles.adapter
        for model in handles.models.values():
            freeze_a(model, self.adapter)

    def state_dict(self) -> dict[str, Any]:
        return {name: pair(layer, self.adapter)[0].detach().cpu().clone() for name, layer in self.layers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, layer in self.layers.items():
                if name not in state:
                    raise InputError(f"The checkpoint has no frozen A for the layer '{name}': start a new run.")
                pair(layer, self.adapter)[0].copy_(state[name])
