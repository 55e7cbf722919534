"""What a person asks of one call, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from adapters.errors import InputError, nearest
from adapters.progress import Monitor, part
from pipelines.diffusion.prompt_syntax import Adapter, Lines, chosen, without_adapters
from pipelines.diffusion.regions.region import PlacedRegion, Region
from pipelines.diffusion.report import Plan


@dataclass(frozen=True)
class Call:
    """The arguments of a call, see :meth:`pipelines.diffusion.pipeline.MultiLoRAPipeline.__call__`."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance_scale: float | None
    seed: int
    images: int
    width: int | None
    height: int | None
    scheduler: str
    monitor: Monitor
    preview_every: int
    true_cfg_scale: float
    output_type: str
    allow_double_guidance: bool

    def each(self) -> list[Call]:
        """One call for each picture."""
        return [
            replace(self, images=1, seed=self.seed + k, monitor=part(self.monitor, k, self.images))
            for k in range(self.images)
        ]

    def decided(self, lines: Lines) -> Call:
        """With every choice in the texts made by the seed."""
        prompt, negative = (chosen(text, self.seed, lines) for text in (self.prompt, self.negative_prompt))
        return replace(self, prompt=prompt, negative_prompt=negative)


@dataclass(frozen=True)
class Output:
    """The pictures of a call (PIL images, or latents if asked), the plan they followed and where its regions were
    (automatic ones: of each picture, one after the other)."""

    images: Any
    plan: Plan
    flagged: tuple[bool, ...] = ()
    regions: tuple[PlacedRegion, ...] = ()


def together(outputs: Sequence[Output]) -> Output:
    """Calls for one picture each, as if they were one (with the plan of the first)."""
    images = [output.images for output in outputs]
    joined = torch.cat(images) if isinstance(images[0], torch.Tensor) else [one for part in images for one in part]
    return Output(
        joined,
        outputs[0].plan,
        tuple(flag for output in outputs for flag in output.flagged),
        tuple(region for output in outputs for region in output.regions),
    )


def decided(regions: Sequence[Region], seed: int, lines: Lines) -> tuple[Region, ...]:
    """The regions with every choice in their texts made by the seed."""
    return tuple(
        replace(
            region,
            prompt=chosen(region.prompt, seed, lines),
            negative=None if region.negative is None else chosen(region.negative, seed, lines),
        )
        for region in regions
    )


def check_named(adapters: Sequence[Adapter], others: Sequence[str], present: Sequence[str]) -> None:
    """Refuse adapters that a prompt names and that cannot act.

    Args:
        others: texts that may name none (the negative prompt, those of regions).
        present: names of the composition's adapters.

    Raises:
        InputError: naming the adapter.
    """
    for adapter in adapters:
        if adapter.name not in present:
            known = ", ".join(present) or "none"
            raise InputError(
                f"The prompt names the adapter '{adapter.name}'{nearest(adapter.name, present)}, which is not part of "
                f"this composition (there: {known}): load it with load_lora, or take it out of the prompt."
            )
    for text in others:
        if found := without_adapters(text)[1]:
            raise InputError(
                f"<lora:{found[0].name}:...> acts in the main prompt only: move it there, or give the adapter to a "
                "region."
            )
