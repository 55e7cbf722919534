"""EVA: One Initialization to Rule them All, Fine-tuning via Explained Variance Adaptation, arXiv 2410.07170.

    A0 = the r right singular vectors of the layer's inputs X (tokens, in) with the largest singular values,   B0 = 0

A reads the directions that vary most in the data. The inputs' second moment X^T X (in, in) is summed over some batches,
which gives the same vectors as the paper's incremental SVD of X (PEFT centres the inputs first). Every layer keeps its
rank: the paper's redistribution of ranks between layers is not done (rho = 1). Trained: A and B. Stored: an ordinary
LoRA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.catalogue import Method
from adapters.initialise.start import StartLayer
from adapters.options import Training

METHOD = Method(
    name="eva",
    title="EVA",
    summary="A starts as the main directions of the layer's inputs on your data, B at zero.",
    stage="initialise",
    makes="ordinary LoRA",
    paper="EVA, arXiv 2410.07170",
    entry="adapters.initialise.eva:start",
    training=Training(key="init", shared=("init_batches",), looks_at="moments", sets="factors"),
)


def eva_factor(moment: Tensor, rank: int) -> Tensor:
    """A0 (r, in) from the inputs' second moment X^T X (in, in), directions in descending order."""
    _, vectors = torch.linalg.eigh(moment)
    return vectors.flip(1)[:, :rank].T.contiguous()


def start(layer: StartLayer) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and a zero B0 (out, r) of one layer."""
    return eva_factor(layer.measured, layer.rank), layer.W0.new_zeros(layer.W0.shape[0], layer.rank)
