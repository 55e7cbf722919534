"""FedIT: Towards Building the Federated GPT: Federated Instruction Tuning, arXiv 2305.05644.

    A = sum_k p_k A_k,   B = sum_k p_k B_k

The federated average of LoRA's factors. Its product differs from the average of the products by the covariance of the
clients' drifts, sum_k p_k (B_k - B)(A_k - A), the bias that the other rules remove or reduce. Clients train A and B
(ordinary LoRA) and begin the next round with the means. The reference of every comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapters.catalogue import Method
from adapters.federated.state import Aggregate, Options, State, bias, layers, mean

METHOD = Method(
    name="fedit",
    title="FedIT",
    summary="Averages A and B separately: the plain reference, with a bias where clients differ.",
    stage="federated",
    makes="ordinary LoRA",
    paper="FedIT, arXiv 2305.05644",
    entry="adapters.federated.fedit:aggregate",
    properties={"trains": "A and B", "linear": True},
)


def aggregate(replies: Sequence[State], weights: Sequence[float], options: Options) -> Aggregate:
    """The weighted mean of every tensor, and per layer the relative ``bias`` of the averaged product."""
    report = {name: {"bias": bias(replies, weights, name)} for name in layers(replies[0])}
    return Aggregate(mean(replies, weights, list(replies[0])), report=report)
