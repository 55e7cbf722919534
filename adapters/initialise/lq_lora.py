"""LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition, arXiv 2311.12023: the start from a compressed base.

``studio compress lq`` makes a base W0 = Q + L1 L2 with Q in few bits (:mod:`adapters.compression.lq_lora`). The pair
that learns starts as the low-rank part, A0 = L2 / s^(1/2), B0 = L1 / s^(1/2), so the model is Q + s B A: what the
decomposition absorbed goes on being trained. As in PiSSA the start is an offset: the saved adapter s (B A - B0 A0) is
an ordinary LoRA of rank 2r, on the compressed base, and on the whole one without its quantisation error.
"""

from __future__ import annotations

from torch import Tensor

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.initialise.start import StartLayer
from adapters.options import Training

METHOD = Method(
    name="lq_lora",
    title="LQ-LoRA",
    summary="For bases made by studio compress lq: starts as their low-rank part, which absorbed what few bits lost.",
    stage="initialise",
    makes="ordinary LoRA",
    paper="LQ-LoRA, arXiv 2311.12023",
    entry="adapters.initialise.lq_lora:start",
    training=Training(key="init", sets="offset"),
)


def start(layer: StartLayer) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) of one layer.

    Raises:
        InputError: the layer has no low-rank part, or one of another rank.
    """
    if layer.low_rank is None:
        raise InputError(
            "init 'lq_lora' starts from the low-rank part of a compressed base, which this layer has not: make a base "
            "with  studio compress lq, or choose init 'pissa'."
        )
    A, B = (side.to(layer.W0) for side in layer.low_rank)
    if A.shape[0] != layer.rank:
        raise InputError(f"the low-rank part of this base has rank {A.shape[0]}: set rank to {A.shape[0]}.")
    return A / layer.scale**0.5, B / layer.scale**0.5
