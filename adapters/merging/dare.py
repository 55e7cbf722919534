"""DARE: Language Models are Super Mario, Absorbing Abilities from Homologous Models as a Free Lunch, arXiv 2311.03099.

On whole updates D_i: each entry is kept with probability ``density`` and divided by it, so that the expectation stays;
the thinned updates are summed with their weights, or merged as TIES does (``then="ties"``). Cut to a rank.
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
    summary="Drops a random share of every adapter's changes and scales up the rest before adding them.",
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
    """Merge thinned updates (see :func:`adapters.merging.deltas.merge_updates`)."""
    check_density(density)
    if then not in ("sum", "ties"):
        raise InputError(f"After dropping, DARE merges by 'sum' or 'ties', not '{then}'.")

    def combine(updates: Tensor, strengths: Tensor, generator: torch.Generator) -> Tensor:
        kept = torch.rand(updates.shape, generator=generator) < density
        thinned = updates * kept / density
        if then == "ties":
            return elect_and_average(thinned, strengths)
        return (thinned * strengths.to(thinned).view(-1, 1, 1)).sum(0)

    return merge_updates(files, weights, rank, combine, seed)
