"""FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations, arXiv 2409.05976.

    W0 <- W0 + s sum_k p_k B_k A_k = W0 + s [p_1 B_1 .. p_K B_K] [A_1; ..; A_K]

Stacked factors give the sum of the products exactly, also for different ranks. It is added to the base, and clients
begin the next round with A drawn anew and B = 0. Every client downloads the factors of all, and the result is a LoRA
as large as all rounds' factors together (or merged weights).
"""

from __future__ import annotations

from collections.abc import Sequence

from adapters.catalogue import Method
from adapters.federated.state import Aggregate, Options, State, layers, mean, others, stacked

METHOD = Method(
    name="flora",
    title="FLoRA",
    summary="Adds the stacked adapters of all clients to the base and starts new ones every round: exact, also for "
    "different ranks; much traffic.",
    stage="federated",
    makes="ordinary LoRA of a higher rank",
    paper="FLoRA, arXiv 2409.05976",
    entry="adapters.federated.flora:aggregate",
    properties={"trains": "A and B", "changes_base": True, "redraws": True, "ragged": True},
)


def aggregate(replies: Sequence[State], weights: Sequence[float], options: Options) -> Aggregate:
    """No A or B to begin with, and per layer the stacked factors to add to W0; other tensors are averaged."""
    residual = {name: stacked(replies, weights, name) for name in layers(replies[0])}
    return Aggregate(mean(replies, weights, others(replies[0])), residual)
