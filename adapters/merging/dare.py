"""DARE: Language Models are Super Mario, Absorbing Abilities from Homologous Models as a Free Lunch, arXiv 2311.03099.

On full updates D_i: each entry is kept with probability ``density`` and divided by it, which preserves the expectation;
the thinned updates are summed with their weights, or merged as in TIES (``then="ties"``), and truncated to a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.formats.lora import LoraFile
from adapters.merging.concatenate import Merged
from adapters.merging.deltas import check_density, merge_updates
from adapters.merging.ties import elect_and_average

METHOD = Method(
    name="dare",
    title="DARE",
    summary="Drops a random share of each adapter's update and scales up the rest before adding them.",
    stage="merging",
    makes="ordinary LoRA",
    paper="DARE, arXiv 2311.03099",
    entry="adapters.merging.dare:dare",
)


def dare(
    files: Sequence[LoraFile],
    weights: Sequence[Mapping[str, float] | float],
    rank: int | None = None,
    density: float = 0.5,
    then: Literal["sum", "ties"] = "sum",
    seed: int = 0,
) -> Merged:
    """Merge thinned updates.

    Args:
        files, weights, rank, seed: as for :func:`adapters.merging.deltas.merge_updates`.
        density: share of entries kept, in (0, 1].
        then: how the thinned updates are merged.

    Raises:
        InputError: as :func:`adapters.merging.deltas.merge_updates`, or a density or ``then`` that is not possible.
    """
    check_density(density)
    if then not in ("sum", "ties"):
        raise InputError(f"DARE merges the thinned updates by 'sum' or 'ties', not '{then}'.")

    def combine(updates: Tensor, strengths: Tensor, generator: torch.Generator) -> Tensor:
        kept = torch.rand(updates.shape, generator=generator) < density
        thinned = updates * kept / density
        if then == "ties":
            return elect_and_average(thinned, strengths)
        return (thinned * strengths.to(thinned).view(-1, 1, 1)).sum(0)

    return merge_updates(files, weights, rank, combine, seed)
