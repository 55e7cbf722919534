"""Magnitude pruning: the largest entries of each full update, summed with the weights and truncated to a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapters.catalogue import Method
from adapters.formats.lora import LoraFile
from adapters.merging.concatenate import Merged
from adapters.merging.deltas import check_density, keep_largest, merge_updates

METHOD = Method(
    name="magnitude",
    title="Magnitude pruning",
    summary="Adds only the largest entries of each adapter's update.",
    stage="merging",
    makes="ordinary LoRA",
    paper="",
    entry="adapters.merging.magnitude:magnitude",
)


def magnitude(
    files: Sequence[LoraFile],
    weights: Sequence[Mapping[str, float] | float],
    rank: int | None = None,
    density: float = 0.5,
) -> Merged:
    """Sum the largest entries, a share of ``density`` per layer (see :func:`adapters.merging.deltas.merge_updates`)."""
    check_density(density)

    def combine(updates: Tensor, strengths: Tensor, generator: torch.Generator) -> Tensor:
        pruned = torch.stack([keep_largest(update, density) for update in updates])
        return (pruned * strengths.to(pruned).view(-1, 1, 1)).sum(0)

    return merge_updates(files, weights, rank, combine)
