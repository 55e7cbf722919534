"""How large a mixture is, compared with one LoRA on the same layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from adapters.layers.experts.model import expert_layers
from adapters.layers.sizes import sizes


@dataclass(frozen=True)
class Size:
    """The numbers of a mixture.

    Attributes:
        experts: numbers in the experts; ``routers``: in the routers.
        rank: of the LoRA on the same layers that has about as many numbers.
        active: numbers that one token uses.
    """

    experts: int
    routers: int
    rank: int
    active: int

    def __str__(self) -> str:
        return (
            f"The mixture has {self.experts + self.routers:,} parameters ({self.routers:,} of them in routers), of "
            f"which a token uses {self.active:,}; a LoRA of as many on the same layers has rank {self.rank}"
        )


def size(model: nn.Module, adapter: str = "default") -> Size:
    """The size of an adapter of a model."""
    experts = routers = active = per_rank = 0
    for layer in expert_layers(model).values():
        if adapter not in layer.places:
            continue
        place = layer.places[adapter]
        for role in place.roles:
            per_rank += sum(sizes(layer.linear(role)))
            found = layer.factors(adapter, role)
            numbers = sum(t.numel() for t in (found.A, found.B, found.magnitude) if t is not None)
            experts += numbers
            active += numbers * place.top_k // place.experts
        if adapter in layer.moeadapter_router:
            own = sum(p.numel() for p in layer.moeadapter_router[adapter].parameters())
            routers, active = routers + own, active + own
    return Size(experts, routers, max(1, round((experts + routers) / per_rank)) if per_rank else 0, active)
