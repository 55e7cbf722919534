"""A mixture as an ordinary LoRA, where that is exact: one expert everywhere, or gates that do not depend on the token.

With constant gates g_e the update sum_e g_e s B_e A_e is one low-rank product of rank sum_e r_e: A is the experts' A on
top of each other, B their B side by side, times g_e s. A feed-forward block with several experts has no such form (each
expert has its own non-linearity), nor have several DoRA experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adapters.errors import InputError
from adapters.formats.lora import LoraLayer
from adapters.layers.experts.frozen import FrozenExperts
from adapters.layers.experts.layer import ExpertBlock, ExpertLayer
from adapters.layers.experts.model import expert_layers

Constant = Sequence[float] | Tensor
"""One gate per expert (N,)."""


@torch.no_grad()
def as_lora(
    model: nn.Module, adapter: str = "default", gates: Constant | Mapping[str, Constant] | None = None
) -> dict[str, LoraLayer]:
    """The adapter as ordinary LoRA layers: module path -> layer, with the scale in B (alpha = rank).

    Args:
        gates: constant gates (N,), for all modules or by module path; None where there is one expert.

    Raises:
        InputError: the update depends on the token, or has no low-rank form.
    """
    found: dict[str, LoraLayer] = {}
    for path, layer in expert_layers(model).items():
        if adapter not in layer.places:
            continue
        if isinstance(layer, FrozenExperts):
            found[path] = layer.as_lora(adapter, _gates(layer, adapter, gates))
            continue
        for role in layer.places[adapter].roles:
            name = f"{path}.{layer.structure.roles[role]}" if isinstance(layer, ExpertBlock) else path
            found[name] = _as_lora(layer, adapter, role, _gates(layer, adapter, gates))
    if not found:
        raise InputError(f"The model has no expert adapter named '{adapter}'.")
    return found


def _gates(layer: ExpertLayer, adapter: str, gates: Constant | Mapping[str, Constant] | None) -> Tensor:
    place = layer.places[adapter]
    if place.experts == 1 and layer.settings[adapter].routed:
        return torch.ones(1)
    given = gates.get(layer.path) if isinstance(gates, Mapping) else gates
    if given is None:
        raise InputError(
            f"'{layer.path}' has {place.experts} experts, mixed for each token: it becomes an ordinary LoRA only with "
            "constant gates; give them, or keep the adapter as it is."
        )
    if isinstance(layer, ExpertBlock):
        raise InputError(
            f"'{layer.path}' mixes {place.experts} whole feed-forward blocks, which is no LoRA for any gates: keep the "
            "adapter as it is."
        )
    found = torch.as_tensor(given, dtype=torch.float32)
    if found.shape != (place.experts,):
        raise InputError(f"'{layer.path}' has {place.experts} experts, but {found.numel()} gates were given.")
    return found


def _as_lora(layer: ExpertLayer, adapter: str, role: str, gates: Tensor) -> LoraLayer:
    factors = layer.factors(adapter, role)
    if factors.magnitude is not None and (len(gates) > 1 or float(gates[0]) != 1):
        raise InputError(f"'{layer.path}' mixes DoRA experts, which is no LoRA: keep the adapter as it is.")
    A = factors.A.detach().flatten(0, 1)
    weights = (gates.to(factors.B) * factors.scale)[:, None, None]
    B = (factors.B.detach() * weights).transpose(0, 1).flatten(1)
    magnitude = None if factors.magnitude is None else factors.magnitude.detach()[0]
    return LoraLayer(A.clone(), B, alpha=float(A.shape[0]), magnitude=magnitude)
