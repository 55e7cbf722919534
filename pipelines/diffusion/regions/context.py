"""What a call with regions needs from the pipeline."""

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
    """What a call with regions needs from the pipeline.

    Attributes:
        pipe, family, denoisers: the diffusers pipeline, its family and its denoising networks.
        adapters: the composition's adapters joined for the denoiser (with the scope already applied).
        prompts: encodes the regions' texts.
        triggers: adapter -> its trigger words.
        offloaded: single layers move between devices, so a forward pass must not be interrupted.
    """

    pipe: Any
    family: Family
    denoisers: tuple[nn.Module, ...]
    adapters: GatedAdapters
    prompts: Prompts
    triggers: Mapping[str, tuple[str, ...]]
    offloaded: bool

    @property
    def denoiser(self) -> nn.Module:
        """The denoising network (the first, if there are several)."""
        return self.denoisers[0]
