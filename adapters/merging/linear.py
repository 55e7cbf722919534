"""Two plain baselines: the exact sum truncated to a rank, and the sum of the factors.

svd: sum_i w_i s_i B_i A_i, truncated to a rank (Eckart-Young: nothing of that rank is nearer).
linear: A = sum_i sqrt(w_i s_i) A_i, B = sum_i sqrt(w_i s_i) B_i, PEFT's "linear". Equal ranks only. B A has cross terms
B_i A_j that no adapter has learnt, and the order of the ranks matters: a baseline, not a recommendation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.formats.lora import LoraFile, LoraLayer, group_dict, relative_error
from adapters.merging.concatenate import Merged, check_rank, concatenate, cut, join, summands

METHODS = (
    Method(
        name="svd",
        title="SVD of the sum",
        summary="The exact sum of the adapters, truncated to the largest of their ranks with the smallest possible "
        "error.",
        stage="merging",
        makes="ordinary LoRA",
        paper="",
        entry="adapters.merging.linear:svd",
    ),
    Method(
        name="linear",
        title="Sum of factors",
        summary="Adds the A and the B matrices separately, as PEFT's 'linear' does: a baseline with cross terms.",
        stage="merging",
        makes="ordinary LoRA",
        paper="",
        entry="adapters.merging.linear:linear",
    ),
)


def svd(files: Sequence[LoraFile], weights: Sequence[Mapping[str, float] | float], rank: int | None = None) -> Merged:
    """The exact sum truncated to ``rank`` (None = the largest rank of the adapters); raises :class:`InputError`."""
    if not files:
        raise InputError("There is no adapter to merge.")
    largest = max(one for file in files for one in file.ranks())
    return concatenate(files, weights, rank=largest if rank is None else rank)


def linear(
    files: Sequence[LoraFile], weights: Sequence[Mapping[str, float] | float], rank: int | None = None
) -> Merged:
    """The sum of the A and of the B, separately; ``errors`` is the relative distance to the exact sum.

    Raises:
        InputError: nothing to merge, different ranks in one layer, a rank below 1, or a negative weight (it has no
            square root).
    """
    check_rank(rank)
    layers: dict[tuple[str, str], LoraLayer] = {}
    errors: dict[str, float] = {}
    for (component, module), parts in summands(files, weights).items():
        name = f"{component}.{module}"
        if len({layer.rank for layer, _ in parts}) > 1:
            raise InputError(f"'linear' needs equal ranks, but they differ in '{name}': use svd or lego.")
        if any(weight < 0 for _, weight in parts):
            raise InputError("'linear' takes the square root of every weight, so none may be negative.")
        roots = [(weight * layer.scale) ** 0.5 for layer, weight in parts]
        A = torch.stack([root * layer.A.float() for root, (layer, _) in zip(roots, parts, strict=True)]).sum(0)
        B = torch.stack([root * layer.B.float() for root, (layer, _) in zip(roots, parts, strict=True)]).sum(0)
        merged = LoraLayer(A, B, alpha=float(A.shape[0]), embedding=parts[0][0].embedding)
        if rank is not None and rank < merged.rank:
            merged, _ = cut(merged, rank)
        errors[name] = relative_error(merged.delta(), join(parts).delta())
        layers[component, module] = merged
    return Merged(LoraFile(group_dict(layers)), errors)
