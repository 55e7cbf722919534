"""OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, arXiv 2406.01775.

    W0 = Q R (QR decomposition),   B0 = Q[:, :r],   A0 = R[:r]

B starts orthonormal. The paper (and PEFT) subtracts s B0 A0 from W0; here it is an offset, the base is not changed.
Trained: A and B. Stored: an ordinary LoRA of rank 2r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.catalogue import Method
from adapters.initialise.start import StartLayer
from adapters.options import Training

METHOD = Method(
    name="olora",
    title="OLoRA",
    summary="Starts from a QR decomposition of each weight: an orthonormal B, cheaper than PiSSA.",
    stage="initialise",
    makes="ordinary LoRA",
    paper="OLoRA, arXiv 2406.01775",
    entry="adapters.initialise.olora:start",
    training=Training(key="init", sets="offset"),
)


def olora_factors(W0: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) of a weight (out, in)."""
    Q, R = torch.linalg.qr(W0)
    return R[:rank], Q[:, :rank]


def start(layer: StartLayer) -> tuple[Tensor, Tensor]:
    """A0 and B0 of one layer."""
    return olora_factors(layer.W0, layer.rank)
