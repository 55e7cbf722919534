"""What a call with regions needs of the pipeline around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from adapters.layers.gated import GatedAdapters
from pipelines.diffusion.families import Family
from pipelines.diffusion.prompts import Prompts


@dataclass(frozen=True)
class RegionContext:
    """The surroundings of a call with regions.

    Attributes:
        pipe, family, denoiser: the diffusers pipeline, its family and its denoising network.
        adapters: those of the composition, joined for the denoiser (with the scope already applied).
        prompts: encodes the regions' texts.
        triggers: the words that call each adapter, by its name.
        offloaded: single layers move between devices, so a forward pass must not be left half-way.
    """

    pipe: Any
    family: Family
    denoiser: nn.Module
    adapters: GatedAdapters
    prompts: Prompts
    triggers: Mapping[str, tuple[str, ...]]
    offloaded: bool
