"""CorDA: Context-Oriented Decomposition Adaptation of Large Language Models, arXiv 2406.05223.

With C (in, in) the second moment of the layer's inputs, damped until it can be inverted:

    W0 C = U S V^T,   W0 = U S V^T C^-1,   B0 = U_i (S_i / s)^(1/2),   A0 = (S_i / s)^(1/2) V_i^T C^-1

over the r largest singular values (instruction-previewed, ``ipm``: learn along the directions the data uses) or the r
smallest (knowledge-preserved, ``kpm``: keep them). Inputs are divided by the absolute value of the largest entry of
their batch, as in the authors' code. The paper subtracts s B0 A0 from W0; here it is an offset. Trained: A and B.
Stored: an ordinary LoRA of rank 2r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.initialise.start import StartLayer
from adapters.options import Option, Training

METHOD = Method(
    name="corda",
    title="CorDA",
    summary="Starts from the directions of each weight that your data uses: learns along them (ipm) or keeps them "
    "(kpm).",
    stage="initialise",
    makes="ordinary LoRA",
    paper="CorDA, arXiv 2406.05223",
    entry="adapters.initialise.corda:start",
    training=Training(
        key="init",
        shared=("init_batches",),
        options=(
            Option(
                "corda_mode",
                "ipm",
                choices=("kpm", "ipm"),
                help="corda: ipm learns fast along the directions the data uses, kpm keeps them and uses the others.",
            ),
        ),
        looks_at="scaled moments",
        sets="offset",
    ),
)


def corda_factors(W0: Tensor, moment: Tensor, rank: int, scale: float, mode: str = "ipm") -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) of a weight (out, in) and its inputs' second moment (in, in).

    Raises:
        InputError: all inputs were zero.
    """
    damped, inverse = _invertible(moment)
    U, S, Vh = torch.linalg.svd(W0 @ damped, full_matrices=False)
    chosen = slice(None, rank) if mode == "ipm" else slice(S.numel() - rank, None)
    root = (S[chosen] / scale).sqrt()
    return root[:, None] * (Vh[chosen] @ inverse), U[:, chosen] * root


def _invertible(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The moment and its inverse, with a share of the mean diagonal added, doubled until the inverse is accurate."""
    identity = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    mean, damp = moment.diagonal().mean(), 0.01
    if not float(mean) > 0:
        raise InputError("CorDA found only zero inputs in this layer: use other batches, or leave the layer out.")
    while True:
        damped = moment + damp * mean * identity
        inverse = torch.linalg.inv(damped)
        if float(torch.dist(damped @ inverse, identity)) < 0.05:
            return damped, inverse
        damp *= 2


def start(layer: StartLayer, corda_mode: str) -> tuple[Tensor, Tensor]:
    """A0 and B0 of one layer."""
    return corda_factors(layer.W0, layer.measured, layer.rank, layer.scale, corda_mode)
