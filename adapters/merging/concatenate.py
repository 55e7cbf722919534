"""Several LoRAs as one: exact concatenation, or its best rank-k approximation.

    sum_i w_i s_i B_i A_i  =  B A,   A = [A_1; ...; A_N] (R, in),  B = [w_1 s_1 B_1, ..., w_N s_N B_N] (out, R)

The result is an ordinary LoRA with scale 1 (alpha = rank = R). Averaging the A_i and B_i apart would add cross terms
B_i A_j and is not a merge. With ``rank`` below R each layer is truncated to its largest singular values (Eckart-Young:
no rank-k matrix is nearer), computed on the small factors: B A = (Q_B R_B)(Q_A R_A)^T, SVD of R_B R_A^T (R, R).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.formats.lora import MODEL, LoraFile, LoraLayer, group_dict

if TYPE_CHECKING:
    from adapters.merging.accuracy import Accuracy

METHOD = Method(
    name="concatenate",
    title="Exact concatenation",
    summary="The weighted sum of several LoRAs as one ordinary LoRA, exact, or truncated to a rank with each layer's "
    "error.",
    stage="merging",
    makes="ordinary LoRA",
    paper="",
    entry="adapters.merging.concatenate:concatenate",
)


@dataclass(frozen=True, eq=False)
class Merged:
    """A merged adapter.

    Attributes:
        file: the LoRA.
        errors: "component.module" -> relative error of the layer (Frobenius); empty if the merge is exact.
        report: "component.module" -> further facts by name, from methods that have any.
        accuracy: of the file on disk, once it is written.
    """

    file: LoraFile
    errors: Mapping[str, float]
    report: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    accuracy: Accuracy | None = None


def concatenate(
    files: Sequence[LoraFile],
    weights: Sequence[Mapping[str, float] | float],
    factors: Sequence[Mapping[str, float]] = (),
    rank: int | None = None,
) -> Merged:
    """One LoRA equal to the weighted sum of ``files``.

    Args:
        files: adapters with the module paths of one model (fitted).
        weights: per file one weight, or a weight per component (absent = 0).
        factors: per file "component.module" -> extra factor (per-block weights); absent = 1.
        rank: truncate every layer to at most this rank; None = exact.

    Raises:
        InputError: nothing to merge, a DoRA adapter (not a sum), different base models, or a rank below 1.
    """
    check_rank(rank)
    scaled = summands(files, weights, factors)
    layers: dict[tuple[str, str], LoraLayer] = {}
    errors: dict[str, float] = {}
    for (component, module), parts in scaled.items():
        exact = join(parts)
        if rank is None or exact.rank <= rank:
            layers[component, module] = exact
        else:
            layers[component, module], errors[f"{component}.{module}"] = cut(exact, rank)
    return Merged(LoraFile(group_dict(layers)), errors)


def check_rank(rank: int | None) -> None:
    """Raise :class:`InputError` for a rank of a merge below 1."""
    if rank is not None and rank < 1:
        raise InputError(f"The rank of a merged LoRA must be at least 1, got {rank}.")


def summands(
    files: Sequence[LoraFile],
    weights: Sequence[Mapping[str, float] | float],
    factors: Sequence[Mapping[str, float]] = (),
) -> dict[tuple[str, str], list[tuple[LoraLayer, float]]]:
    """(component, module) -> the layers that adapt it, each with its strength (not 0), in the files' order.

    Raises:
        InputError: nothing to merge, not one weight per file, a DoRA adapter, different base models or shapes, or
            values that are not finite.
    """
    if not files:
        raise InputError("There is no adapter to merge.")
    if len(weights) != len(files):
        raise InputError(f"{len(files)} adapters need {len(files)} weights, got {len(weights)}.")
    if any(file.is_dora() for file in files):
        raise InputError("A DoRA adapter rescales the base weight and cannot be written as a sum of LoRAs.")
    alone = [set(file.parts) == {MODEL} for file in files]  # for a single model, not for a pipeline
    if len(set(alone)) > 1:
        raise InputError("Some adapters are for a single model, others for a pipeline: merge adapters of one base.")
    found: dict[tuple[str, str], list[tuple[LoraLayer, float]]] = {}
    for k, (file, weight) in enumerate(zip(files, weights, strict=True)):
        extra = factors[k] if factors else {}
        for component, module, layer in file.layers():
            strength = weight if isinstance(weight, int | float) else weight.get(component, 0.0)
            strength *= extra.get(f"{component}.{module}", 1.0)
            if strength != 0:
                found.setdefault((component, module), []).append((layer, strength))
    if not found:
        raise InputError("Every weight is 0: the merged LoRA would be empty.")
    for (component, module), parts in found.items():
        shapes = {(layer.B.shape[0], tuple(layer.A.shape[1:]), layer.embedding) for layer, _ in parts}
        if len(shapes) > 1:
            raise InputError(f"The adapters have different shapes in '{component}.{module}': they need the same base.")
        if not all(bool(t.isfinite().all()) for layer, _ in parts for t in (layer.A, layer.B)):
            raise InputError(f"An adapter holds values that are not finite in '{component}.{module}'.")
    return found


def join(summands: Sequence[tuple[LoraLayer, float]]) -> LoraLayer:
    """The exact sum of weighted layers, rank R = sum of their ranks, scale 1."""
    A = torch.cat([layer.A.float() for layer, _ in summands])
    B = torch.cat([weight * layer.scale * layer.B.float() for layer, weight in summands], dim=1)
    return LoraLayer(A, B, alpha=float(A.shape[0]), embedding=summands[0][0].embedding)


def cut(layer: LoraLayer, rank: int) -> tuple[LoraLayer, float]:
    """The nearest layer of rank ``rank`` and its relative error in the Frobenius norm."""
    A, B = layer.A.double().flatten(1), layer.scale * layer.B.double().flatten(1)
    left, core_left = torch.linalg.qr(B)
    right, core_right = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(core_left @ core_right.T)
    rank = min(rank, S.numel())
    root = S[:rank].sqrt()
    up = (left @ U[:, :rank] * root).float()
    down = (root[:, None] * (Vh[:rank] @ right.T)).float()
    size = torch.linalg.vector_norm(S)
    error = float(torch.linalg.vector_norm(S[rank:]) / size) if size > 0 else 0.0
    shaped = LoraLayer(
        down.reshape(rank, *layer.A.shape[1:]),
        up.reshape(up.shape[0], rank, *layer.B.shape[2:]),
        alpha=float(rank),
        embedding=layer.embedding,
    )
    return shaped, error
