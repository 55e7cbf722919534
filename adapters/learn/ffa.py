"""FFA-LoRA: Improving LoRA in Privacy-preserving Federated Learning, arXiv 2403.12313 (ICLR 2024).

    y = W0 x + s B A0 x,   A0 drawn once and frozen, B (zero at first) trained

Half the parameters. Averages are exact, sum_k p_k B_k A0 = (sum_k p_k B_k) A0, noise on B stays linear in the update,
and the loss is s^2 L |A0|^2-smooth in B. Because s only rescales B, change the learning rate and leave alpha alone.
Trained: B. Stored: an ordinary LoRA.
"""

from __future__ import annotations

import torch
from torch import nn

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.layers.variant import adapted, freeze, pair

METHOD = Method(
    name="ffa",
    title="FFA-LoRA",
    summary="Freezes A and trains B only: half the parameters, exact averages, steadier under noise.",
    stage="learn",
    makes="ordinary LoRA",
    paper="FFA-LoRA, arXiv 2403.12313",
    entry="adapters.learn.ffa:freeze_a",
)


def freeze_a(model: nn.Module, adapter: str = "default") -> None:
    """Freeze every A of ``model`` so that switching adapters does not thaw it. Call before the optimiser is made.

    Raises:
        InputError: an A that does not span its rank, so that B could never learn the lost directions.
    """
    for name, layer in adapted(model, adapter).items():
        if adapter not in layer.lora_A:
            raise InputError(f"'{name}' is an embedding, whose A cannot be frozen alone: leave it out of the targets.")
        A = pair(layer, adapter)[0].detach().float().flatten(1)
        values = torch.linalg.svdvals(A)
        if not float(values[-1]) > 1e-6 * float(values[0]):
            raise InputError(f"A of '{name}' has less than its full rank {A.shape[0]}: start it at random.")
        freeze(layer, "lora_A", adapter)
