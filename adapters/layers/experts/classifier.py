"""X-LoRA's classifier: gates of all experts from the base model's last hidden state (arXiv 2402.07148, section 2).

Depth 1 is one linear layer; depth D >= 2 is Linear, ReLU, dropout, D - 2 times the same, Linear. It has N outputs, or N
for each of the L adapted modules. It is kept and computed in fp32, whatever the base's precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.errors import InputError, nearest
from adapters.layers.experts.gates import without_autocast


@dataclass(frozen=True)
class ClassifierOptions:
    """How gates are made.

    Attributes:
        depth: linear layers.
        size: width between them.
        dropout: between them, while training.
        relu: ReLU between them (some files of X-LoRA's own program have none).
        layerwise: gates for each adapted module, instead of one set for all.
        softmax: over all experts, before ``top_k``; ``softmax_of_top_k``: over the kept logits, instead.
        temperature: of the softmax.
        top_k: only the largest gates are kept, by index; None = all. They are not renormalised.
        pass_value: gate of every expert while the hidden state is computed; 0 = the base itself.
        weight: gamma, a factor of all updates.
        width: of the hidden state; None = the model's.
    """

    depth: int = 1
    size: int = 2048
    dropout: float = 0.2
    relu: bool = True
    layerwise: bool = False
    softmax: bool = True
    softmax_of_top_k: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    pass_value: float = 0.0
    weight: float = 1.0
    width: int | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ClassifierOptions:
        """From plain values, as a configuration holds them.

        Raises:
            InputError: an unknown name.
        """
        known = {item.name for item in fields(cls)}
        for name in values:
            if name not in known:
                raise InputError(f"The classifier has no option '{name}'{nearest(name, known)}.")
        return cls(**values)

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, experts: int) -> None:
        """Raise :class:`InputError` for values that do not work with so many experts."""
        for name, least in (("depth", 1), ("size", 1)):
            if getattr(self, name) < least:
                raise InputError(f"The classifier's {name} must be at least {least}, but is {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"The classifier's dropout must be in [0, 1), but is {self.dropout:g}.")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise InputError(f"The temperature must be above 0, but is {self.temperature:g}.")
        if self.top_k is not None and not 1 <= self.top_k <= experts:
            raise InputError(f"top_k must be from 1 to the {experts} experts, but is {self.top_k}.")
        if self.softmax and self.softmax_of_top_k:
            raise InputError(
                "A softmax of a softmax is nearly uniform: switch softmax or softmax_of_top_k off (use exactly one)."
            )
        if self.softmax_of_top_k and self.top_k is None:
            raise InputError("softmax_of_top_k is over the kept experts: set top_k.")
        if not (math.isfinite(self.pass_value) and math.isfinite(self.weight)):
            raise InputError("pass_value and weight must be finite numbers.")


class Classifier(nn.Module):
    """The trained part of an X-LoRA.

    Args:
        experts: N.
        modules: L.
        width: of the hidden state.
    """

    def __init__(self, options: ClassifierOptions, experts: int, modules: int, width: int, device: Any = None) -> None:
        super().__init__()
        self.options, self.experts, self.modules_count = options, experts, modules
        outputs = experts * (modules if options.layerwise else 1)
        sizes = [width, *[options.size] * (options.depth - 1), outputs]
        for number, (inputs, out) in enumerate(pairwise(sizes)):
            made = nn.Linear(inputs, out, device=device, dtype=torch.float32)
            # flat names: PEFT takes the adapter's name out of a key only just before its last part
            setattr(self, f"weight_{number}", made.weight)
            setattr(self, f"bias_{number}", made.bias)

    def linear_layers(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """(weight, bias) of each linear layer."""
        for number in range(self.options.depth):
            yield getattr(self, f"weight_{number}"), getattr(self, f"bias_{number}")

    def forward(self, hidden: Tensor) -> Tensor:
        """Gates for hidden states (batch, length, d): (batch, length, N), layer-wise (batch, length, L, N)."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with without_autocast(hidden):
            x = hidden.to(dtype)
            for number, (weight, bias) in enumerate(self.linear_layers()):
                if number:
                    x = F.dropout(F.relu(x) if self.options.relu else x, self.options.dropout, self.training)
                x = F.linear(x, weight.to(dtype), bias.to(dtype))
            if self.options.layerwise:
                x = x.unflatten(-1, (self.modules_count, self.experts))
            return gates_of(x, self.options)


def gates_of(logits: Tensor, options: ClassifierOptions) -> Tensor:
    """Gates (..., N) from logits (..., N)."""
    gates = (logits / options.temperature).softmax(-1) if options.softmax else logits
    if options.top_k is None or options.top_k == logits.shape[-1]:
        return (gates / options.temperature).softmax(-1) if options.softmax_of_top_k else gates
    kept, chosen = gates.topk(options.top_k, dim=-1)
    if options.softmax_of_top_k:
        kept = (kept / options.temperature).softmax(-1)
    return torch.zeros_like(gates).scatter(-1, chosen, kept)
