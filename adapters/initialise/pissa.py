"""PiSSA: Principal Singular Values and Singular Vectors Adaptation, arXiv 2404.02948.

    W0 = U S V^T,   B0 = U_r (S_r / s)^(1/2),   A0 = (S_r / s)^(1/2) V_r^T,   so that  s B0 A0 = U_r S_r V_r^T

The adapter starts as the principal part of the weight itself, so it learns along the directions that matter most. The
paper (and PEFT) subtracts s B0 A0 from W0; here it is an offset, the base is not changed. Trained: A and B. Stored: an
ordinary LoRA of rank 2r, s (B A - B0 A0).
"""

from __future__ import annotations

from torch import Tensor

from adapters.catalogue import Method
from adapters.initialise.start import StartLayer
from adapters.low_rank import truncated_svd
from adapters.options import Training

METHOD = Method(
    name="pissa",
    title="PiSSA",
    summary="Starts as the principal part of each weight: learns faster and suits noisy or quantised bases.",
    stage="initialise",
    makes="ordinary LoRA",
    paper="PiSSA, arXiv 2404.02948",
    entry="adapters.initialise.pissa:start",
    training=Training(key="init", sets="offset"),
)


def pissa_factors(W0: Tensor, rank: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) of a weight (out, in)."""
    U, S, Vh = truncated_svd(W0, rank, seed)
    root = (S / scale).sqrt()
    return root[:, None] * Vh, U * root


def start(layer: StartLayer) -> tuple[Tensor, Tensor]:
    """A0 and B0 of one layer."""
    return pissa_factors(layer.W0, layer.rank, layer.scale, layer.seed)
