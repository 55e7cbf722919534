"""Safe LoRA: The Silver Lining of Reducing Safety Risks when Fine-tuning LLMs, arXiv 2405.16833 (NeurIPS 2024).

With the alignment V = W_aligned - W_unaligned (out, in) of a module, and its update D = s B A, B is replaced by C B
where the update points away from the alignment, cos(C D, D) < tau; A stays:

    "safelora"   C = V V^T / |V|              as the paper; C is no projector, so D also changes its length
    "exact"      P = U_k U_k^T                the projector on V's leading left singular vectors: P P = P, |P D| <= |D|

A step along -V lies inside both subspaces and is kept, although it undoes the alignment. So where the undo coefficient
u = -<V, D> / |V|^2 exceeds a limit, :func:`without_undo` also takes that part out, D - min(0, <V, D> / |V|^2) V, and
stores the result at its rank by SVD. Nothing here can move a weight away from the aligned model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from adapters.catalogue import Method
from adapters.formats.lora import LoraLayer
from adapters.inspection.alignment import dot, safe_lora_score, subspace, undo
from adapters.merging.deltas import nearest

METHOD = Method(
    name="safe-lora",
    title="Safe LoRA",
    summary="Projects an adapter on what alignment changed in the base, where it points away from it.",
    stage="inspection",
    makes="ordinary LoRA",
    paper="Safe LoRA: The Silver Lining of Reducing Safety Risks when Fine-tuning Large Language Models, "
    "arXiv 2405.16833",
    entry="adapters.inspection.safe_lora:mitigated",
)

Mode = Literal["exact", "safelora"]


@dataclass(frozen=True)
class Mitigated:
    """One module.

    Attributes:
        layer: the new layer, or the given one.
        score: Safe LoRA's score before.
        undo: u before.
        projected: whether B was replaced.
        undone: whether the part along -V was taken out.
        error: relative error of the rank truncation that needed; 0 otherwise.
    """

    layer: LoraLayer
    score: float
    undo: float
    projected: bool
    undone: bool
    error: float


def mitigated(
    layer: LoraLayer, V: Tensor, mode: Mode = "exact", tau: float = 0.5, undo_limit: float = 0.05
) -> Mitigated:
    """A layer pulled towards the aligned model.

    Args:
        layer: of a linear module; no DoRA.
        V: W_aligned - W_unaligned (out, in).
        tau: project where the score is below this.
        undo_limit: take the part along -V out where u is above this.
    """
    V = V.double()
    if not bool(V.any()):
        return Mitigated(layer, 0.0, 0.0, False, False, 0.0)
    L, R = layer.scale * layer.B.double(), layer.A.double()
    score, u = safe_lora_score(V, L, R), undo(V, L, R)
    made = projected(layer, V, mode) if score < tau else layer
    error, undone = 0.0, u > undo_limit
    if undone:
        made, error = without_undo(made, V)
    return Mitigated(made, score, u, score < tau, undone, error)


def projected(layer: LoraLayer, V: Tensor, mode: Mode = "exact") -> LoraLayer:
    """The layer with B replaced by P B ("exact") or C B ("safelora")."""
    V, B = V.double(), layer.B.double()
    if mode == "exact":
        U = subspace(V)
        made = U @ (U.T @ B)
    else:
        made = V @ (V.T @ B) / V.norm()
    return replace(layer, B=made.to(layer.B.dtype))


def without_undo(layer: LoraLayer, V: Tensor) -> tuple[LoraLayer, float]:
    """The nearest layer of the same rank to D - min(0, <V, D> / |V|^2) V, and its relative error."""
    V = V.double()
    L, R = layer.scale * layer.B.double(), layer.A.double()
    step = min(0.0, dot(V, L, R) / float(V.square().sum()))
    if step == 0:
        return layer, 0.0
    made, error = nearest(L @ R - step * V, layer.rank, layer)
    # the configuration keeps its alpha: the product is stored divided by the layer's scale
    return replace(layer, A=made.A.to(layer.A.dtype), B=(made.B / layer.scale).to(layer.B.dtype)), error
