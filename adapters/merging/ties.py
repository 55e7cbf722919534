"""TIES-Merging: Resolving Interference When Merging Models, arXiv 2306.01708.

On full updates D_i: trim each to its largest entries (``density``), elect per entry the sign with the larger weighted
sum, and average the entries that agree with it. The result, times ``scale`` (the paper's lambda), is truncated to a
rank.

The authors trim the whole task vector at once; here each layer is trimmed to ``density``, because the size of the
updates differs much between the layers of a LoRA and small ones would lose everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapters.catalogue import Method
from adapters.formats.lora import LoraFile
from adapters.merging.concatenate import Merged
from adapters.merging.deltas import check_density, keep_largest, merge_updates

METHOD = Method(
    name="ties",
    title="TIES",
    summary="Keeps the largest entries of each adapter's update, elects one sign per weight and averages what agrees.",
    stage="merging",
    makes="ordinary LoRA",
    paper="TIES-Merging, arXiv 2306.01708",
    entry="adapters.merging.ties:ties",
)


def ties(
    files: Sequence[LoraFile],
    weights: Sequence[Mapping[str, float] | float],
    rank: int | None = None,
    density: float = 0.2,
    scale: float = 1.0,
) -> Merged:
    """Merge by trimming, electing signs and averaging.

    Args:
        files, weights, rank: as for :func:`adapters.merging.deltas.merge_updates`.
        density: share of entries kept per layer, in (0, 1].
        scale: the paper's lambda.

    Raises:
        InputError: as :func:`adapters.merging.deltas.merge_updates`, or a density out of range.
    """
    check_density(density)

    def combine(updates: Tensor, strengths: Tensor, generator: torch.Generator) -> Tensor:
        return scale * elect_and_average(torch.stack([keep_largest(u, density) for u in updates]), strengths)

    return merge_updates(files, weights, rank, combine)


def elect_and_average(updates: Tensor, strengths: Tensor) -> Tensor:
    """Per entry, the mean of the weighted updates (N, out, in) that have the elected sign: (out, in)."""
    weighted = updates * strengths.to(updates).view(-1, 1, 1)
    elected = weighted.sum(0).sign()
    elected[elected == 0] = 1
    agree = weighted.sign() == elected
    return torch.where(agree, weighted, torch.zeros_like(weighted)).sum(0) / agree.sum(0).clamp_min(1)
