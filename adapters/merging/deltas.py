"""Merging full updates instead of factors: D_i = s_i B_i A_i, combined entry by entry and truncated to a rank.

Merging the factors A_i and B_i separately, as PEFT's ``add_weighted_adapter`` does by default, would add cross terms
B_i A_j that no adapter has learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from adapters.errors import InputError
from adapters.formats.lora import LoraFile, LoraLayer, group_dict
from adapters.low_rank import truncated_svd
from adapters.merging.concatenate import Merged, check_rank, summands

Combine = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(updates without their weights (N, out, in), weights (N,), random generator) -> merged update (out, in)."""


def merge_updates(
    files: Sequence[LoraFile],
    weights: Sequence[Mapping[str, float] | float],
    rank: int | None,
    combine: Combine,
    seed: int = 0,
) -> Merged:
    """The LoRA nearest to the combined updates.

    Args:
        files, weights: as for :func:`adapters.merging.concatenate.concatenate`.
        rank: of the result; None = the sum of the adapters' ranks.
        combine: merges the updates of one layer.
        seed: of the generator given to ``combine``.

    Returns:
        The LoRA and, per layer, the relative error of the truncation to its rank.

    Raises:
        InputError: nothing to merge, or a rank below 1.
    """
    check_rank(rank)
    layers: dict[tuple[str, str], LoraLayer] = {}
    errors: dict[str, float] = {}
    generator = torch.Generator().manual_seed(seed)
    for (component, module), parts in summands(files, weights).items():
        updates = torch.stack([layer.delta().flatten(1) for layer, _ in parts])
        merged = combine(updates, torch.tensor([weight for _, weight in parts]), generator)
        size = rank or sum(layer.rank for layer, _ in parts)
        layers[component, module], errors[f"{component}.{module}"] = nearest(merged, size, parts[0][0])
    return Merged(LoraFile(group_dict(layers)), errors)


def nearest(update: Tensor, rank: int, like: LoraLayer) -> tuple[LoraLayer, float]:
    """The nearest layer of ``rank`` to ``update`` (out, in * kernel), shaped like ``like``, and its relative error."""
    U, S, Vh = truncated_svd(update, rank)
    root = S.sqrt()
    A, B = (root[:, None] * Vh).reshape(-1, *like.A.shape[1:]), (U * root).reshape(U.shape[0], -1, *like.B.shape[2:])
    size = torch.linalg.vector_norm(update)
    left = (size.square() - S.square().sum()).clamp_min(0).sqrt()
    made = LoraLayer(A.contiguous(), B.contiguous(), alpha=float(A.shape[0]), embedding=like.embedding)
    return made, float(left / size) if size > 0 else 0.0


def keep_largest(update: Tensor, density: float) -> Tensor:
    """``update`` with all but its largest entries, a share of ``density``, set to zero."""
    count = max(1, int(density * update.numel()))
    kept = torch.zeros_like(update).flatten()
    places = update.flatten().abs().topk(count).indices
    kept[places] = update.flatten()[places]
    return kept.view_as(update)


def check_density(density: float) -> None:
    """Raise :class:`InputError` for a density outside (0, 1]."""
    if not 0 < density <= 1:
        raise InputError(f"density, the share of entries kept, must be in (0, 1], got {density}.")
