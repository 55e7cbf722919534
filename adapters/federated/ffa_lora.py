"""FFA-LoRA: Improving LoRA in Privacy-preserving Federated Learning, arXiv 2403.12313 (ICLR 2024).

    y = W0 x + s B A0 x,   B = sum_k p_k B_k

A0 is drawn once and sent to everybody, as numbers (a seed would give other numbers on other machines); clients train
and send only B. The average is exact, sum_k p_k B_k A0 = (sum_k p_k B_k) A0, and noise on B enters the update linearly.
The client's side is :mod:`adapters.learn.ffa`.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapters.catalogue import Method
from adapters.federated.state import Aggregate, Options, State, mean

METHOD = Method(
    name="ffa-lora",
    title="FFA-LoRA",
    summary="A is drawn once and frozen, clients train and send B: exact averages, half the traffic, stable under "
    "noise.",
    stage="federated",
    makes="ordinary LoRA",
    paper="FFA-LoRA, arXiv 2403.12313",
    entry="adapters.federated.ffa_lora:aggregate",
    properties={"trains": "B", "linear": True},
)


def aggregate(replies: Sequence[State], weights: Sequence[float], options: Options) -> Aggregate:
    """The weighted mean of every B and of the tensors trained as a whole."""
    return Aggregate(mean(replies, weights, list(replies[0])))
