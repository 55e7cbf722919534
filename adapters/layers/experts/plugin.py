"""A mixture of experts in the training loop: its auxiliary loss, and what the routers do."""

from __future__ import annotations

import math
from typing import Any

import torch

from adapters.layers.experts.losses import aux_loss, load
from adapters.layers.experts.routing import routing_of
from adapters.plugin import Answers, Handles, Outputs, Plugin


class ExpertsPlugin(Plugin):
    """Adds the auxiliary loss of the last forward pass, and logs how evenly the experts are used.

    Logged: ``router_loss``, and over the routers ``router_busiest`` (largest share of one expert, times N: 1 is even),
    ``router_unused`` (experts without a token) and ``router_entropy`` (of a token's probabilities over ln N, the
    mean: 1 is a router that does not decide).
    """

    name = "experts"

    def after_inject(self, handles: Handles) -> None:
        self.model = next(iter(handles.models.values()))
        self.adapter = handles.adapter

    def loss(self, loss: torch.Tensor, outputs: Outputs | Answers) -> tuple[torch.Tensor, dict[str, float]]:
        records = routing_of(self.model).records.get(self.adapter, {})
        if not records:
            return loss, {}
        aux = aux_loss(self.model, self.adapter)
        loads = load(records.values())
        logs: dict[str, Any] = {
            "router_loss": float(aux.detach()),
            "router_busiest": max(max(one.fraction) * len(one.fraction) for one in loads),
            "router_unused": float(sum(one.unused for one in loads)),
            "router_entropy": sum(one.entropy / math.log(len(one.fraction)) for one in loads) / len(loads),
        }
        return loss + aux.to(loss.device) * (outputs.share if isinstance(outputs, Answers) else 1.0), logs


class GatesPlugin(Plugin):
    """X-LoRA: logs each expert's mean gate (``gate_NAME``) over the tokens of a pass, padding left out."""

    name = "gates"

    def after_inject(self, handles: Handles) -> None:
        self.model = next(iter(handles.models.values()))
        self.adapter = handles.adapter

    def loss(self, loss: torch.Tensor, outputs: Outputs | Answers) -> tuple[torch.Tensor, dict[str, float]]:
        from adapters.layers.experts.xlora import last_gates, names

        gates = last_gates(self.model)
        if gates is None:
            return loss, {}
        each = gates.mean(2) if gates.ndim == 4 else gates
        mask = routing_of(self.model).attention_mask
        weight = torch.ones_like(each[..., 0]) if mask is None else mask[:, -each.shape[1] :].to(each)
        means = (each * weight[..., None]).sum((0, 1)) / weight.sum().clamp_min(1)
        told = zip(names(self.model, self.adapter), means.tolist(), strict=True)
        return loss, {f"gate_{name}": value for name, value in told}
