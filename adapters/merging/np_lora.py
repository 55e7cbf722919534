"""NP-LoRA: a concept and a style as one LoRA, with the concept projected out of the style's main directions.

"NP-LoRA: Null Space Projection Unifies Subject and Style in LoRA Fusion" (arXiv 2511.11051). With D_s = U S V^T the
style's update of a layer and V_k (in, k) its first right singular vectors, the concept's update D_c is projected to
ignore inputs along V_k, and the two are added:

    hard   D = w_s D_s + w_c D_c (I - V_k V_k^T)
    soft   D = w_s D_s + w_c D_c (I - mu / (1 + mu) V_k V_k^T)

The soft form is the minimiser of |X - D_c|_F^2 + mu |X V_k|_F^2: mu = 0 is the plain merge, mu -> infinity the hard
form. (It is our reading of the paper's "soft projection"; the paper's own formula could not be compared.) Only A_c
changes, so the result is an ordinary LoRA of rank r_s + r_c, as exact as concatenation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.formats.lora import LoraFile, LoraLayer
from adapters.low_rank import compact_svd
from adapters.merging.concatenate import Merged, concatenate

METHOD = Method(
    name="np-lora",
    title="Null space projection",
    summary="Adds a concept and a style (in this order) after projecting the style's main directions out of the "
    "concept.",
    stage="merging",
    makes="ordinary LoRA",
    paper="NP-LoRA: Null Space Projection Unifies Subject and Style in LoRA Fusion, arXiv 2511.11051",
    entry="adapters.merging.np_lora:np_lora",
)


def np_lora(
    files: Sequence[LoraFile],
    weights: Sequence[Mapping[str, float] | float],
    rank: int | None = None,
    directions: int | None = None,
    mu: float = math.inf,
) -> Merged:
    """Merge a concept and a style.

    Args:
        files: the concept, then the style, with the module paths of one model.
        weights: as for :func:`adapters.merging.concatenate.concatenate`.
        rank: truncate every layer to at most this rank.
        directions: k, how many of the style's directions are projected out of the concept; None = all.
        mu: strength of the projection; 0 = none, infinity = hard.

    Raises:
        InputError: not two adapters, adapters of different layers, a DoRA adapter, or a value out of range.
    """
    if len(files) != 2:
        raise InputError(f"NP-LoRA merges a concept and a style: give two adapters, not {len(files)}.")
    if directions is not None and directions < 1:
        raise InputError(f"NP-LoRA projects out at least 1 direction, got {directions}.")
    if math.isnan(mu) or mu < 0:
        raise InputError(f"NP-LoRA's mu must be from 0 (plain merge) to inf (hard projection), got {mu}.")
    concept, style = files
    same_targets(concept, style, "NP-LoRA")
    parts = {
        component: {
            module: project(layer, style.parts[component][module], directions, mu) for module, layer in layers.items()
        }
        for component, layers in concept.parts.items()
    }
    return concatenate([replace(concept, parts=parts), style], weights, rank=rank)


def project(concept: LoraLayer, style: LoraLayer, directions: int | None = None, mu: float = math.inf) -> LoraLayer:
    """``concept`` with the style's first right singular vectors projected out of its inputs; softly if mu is finite."""
    V = principal_inputs(style, directions)
    part = 1.0 if math.isinf(mu) else mu / (1 + mu)
    A = concept.A.double().flatten(1)
    return replace(concept, A=(A - part * (A @ V) @ V.T).to(torch.float32).reshape(concept.A.shape))


def principal_inputs(layer: LoraLayer, directions: int | None = None) -> Tensor:
    """V_k (in, k): the inputs to which the layer's update responds most; directions without effect are left out."""
    _, S, Vh = compact_svd(layer.scale * layer.B.double().flatten(1), layer.A.double().flatten(1))
    real = int((S.max() * 1e-9 < S).sum()) if S.numel() and S.max() > 0 else 0
    return Vh[: real if directions is None else min(real, directions)].T


def same_targets(first: LoraFile, second: LoraFile, method: str) -> None:
    """Raise :class:`InputError` unless both adapters change the same layers."""
    names = [{f"{component}.{module}" for component, module, _ in file.layers()} for file in (first, second)]
    odd = sorted(names[0] ^ names[1])
    if odd:
        raise InputError(
            f"{method} needs adapters of the same layers, but {len(odd)} are in only one of them, such as '{odd[0]}'."
        )
