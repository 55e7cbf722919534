"""FlexLoRA: Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources, arXiv
2402.11505.

    sum_k p_k B_k A_k = U S V^T,   B = U_r S_r,   A = V_r^T

The nearest pair of rank r to the averaged product. A client of a lower rank r_k takes the first r_k columns and rows,
which is again the nearest pair. The product is factored by QR and never formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adapters.catalogue import Method
from adapters.federated.state import A, Aggregate, B, Options, State, layers, mean, others, stacked
from adapters.low_rank import compact_svd

METHOD = Method(
    name="flexlora",
    title="FlexLoRA",
    summary="Averages the products and takes the nearest pair of the rank by SVD; clients may have different ranks.",
    stage="federated",
    makes="ordinary LoRA",
    paper="FlexLoRA, arXiv 2402.11505",
    entry="adapters.federated.flexlora:aggregate",
    properties={"trains": "A and B", "ragged": True},
)


def aggregate(replies: Sequence[State], weights: Sequence[float], options: Options) -> Aggregate:
    """The truncated SVD of the averaged product, and per layer the relative ``bias`` that truncation leaves."""
    tensors, report = mean(replies, weights, others(replies[0])), {}
    for name in layers(replies[0]):
        rank = options.rank or max(reply[name + A].shape[0] for reply in replies)
        U, S, Vh = compact_svd(*stacked(replies, weights, name))
        tensors[name + A], tensors[name + B] = Vh[:rank].contiguous(), (U[:, :rank] * S[:rank]).contiguous()
        whole = torch.linalg.vector_norm(S)
        report[name] = {"bias": float(torch.linalg.vector_norm(S[rank:]) / whole) if whole > 0 else 0.0}
    return Aggregate(tensors, report=report)
