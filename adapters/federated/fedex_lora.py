"""FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models, arXiv 2410.09432.

    A = sum_k p_k A_k,   B = sum_k p_k B_k,   W0 <- W0 + s (sum_k p_k B_k A_k - B A)

The averaged factors go on, and what they miss is added to the base: exact without starting anew. The residual has rank
(K - 1) r (:func:`adapters.federated.state.deviation`), so that it is sent as factors. The result is a LoRA as large as
all rounds' residuals and the last pair together (or merged weights).
"""

from __future__ import annotations

from collections.abc import Sequence

from adapters.catalogue import Method
from adapters.federated.state import Aggregate, Options, State, bias, deviation, layers, mean

METHOD = Method(
    name="fedex-lora",
    title="FedEx-LoRA",
    summary="Averages A and B and adds what their product misses to the base: exact; much traffic.",
    stage="federated",
    makes="ordinary LoRA of a higher rank",
    paper="FedEx-LoRA, arXiv 2410.09432",
    entry="adapters.federated.fedex_lora:aggregate",
    properties={"trains": "A and B", "changes_base": True},
)


def aggregate(replies: Sequence[State], weights: Sequence[float], options: Options) -> Aggregate:
    """The means, per layer the factors of the residual, and the relative ``bias`` that it removes."""
    names = layers(replies[0])
    residual = {name: deviation(replies, weights, name) for name in names}
    report = {name: {"removed": bias(replies, weights, name), "bias": 0.0} for name in names}
    return Aggregate(mean(replies, weights, list(replies[0])), residual, report)
