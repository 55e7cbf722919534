"""One call with regions: text of every row, the run at the method's level, what happens before and between steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapters.errors import InputError
from adapters.formats import LoraFile
from pipelines.diffusion.families import Encoding
from pipelines.diffusion.regions import masks
from pipelines.diffusion.regions.blend import Blending, latent_grid
from pipelines.diffusion.regions.joint import RegionalTransformer, joined
from pipelines.diffusion.regions.masks import Place
from pipelines.diffusion.regions.region import CROSS_LAYERS, PlacedRegion, Region, RegionOptions
from pipelines.diffusion.regions.unet import RegionalUNet, RowText
from pipelines.diffusion.text import Voices

if TYPE_CHECKING:
    from pipelines.diffusion.pipeline import Asked, Loaded, MultiLoRAPipeline
    from pipelines.diffusion.report import Plan

Run = RegionalUNet | RegionalTransformer | Blending


class RegionalCall:
    """One call with regions.

    Args:
        composer: the pipeline.
        plan: the steps.
        regions: the regions, with a place each.
        options: how they are used, everything decided.
        asked: what the pipeline was called with.
    """

    def __init__(
        self,
        composer: MultiLoRAPipeline,
        plan: Plan,
        regions: Sequence[Region],
        options: RegionOptions,
        asked: Asked,
    ) -> None:
        self.composer, self.plan, self.regions, self.options, self.asked = composer, plan, regions, options, asked
        self.size = asked.size
        self.places = [masks.place(region) for region in regions]
        check_places(self.places, regions, latent_grid(composer.family, composer.pipe, *asked.size), asked.size)
        texts = [(asked.prompt, asked.negative)]
        texts += [
            (region.prompt or asked.prompt, asked.negative if region.negative is None else region.negative)
            for region in regions
        ]
        self.encodings = composer.encode_rows(texts, regions, asked.images, asked.guided)
        self.run = self._run()

    def start(self, generators: Sequence[torch.Generator]) -> dict[str, Any]:
        """The latents to begin with, where they are not the usual noise."""
        return {}

    def between(self, step: int, latents: Tensor) -> dict[str, Any]:
        """The latents corrected before step number ``step``."""
        return {}

    @property
    def hard(self) -> bool:
        """Cells belong to a region or not (the paper's way)."""
        return self.plan.method in ("cross", "lora-composer")

    def arguments(self) -> dict[str, Any]:
        """What the diffusers pipeline is given as its prompt."""
        if isinstance(self.run, RegionalTransformer):
            return joined(self.encodings).call_arguments()
        return self.encodings[0].call_arguments()

    @contextmanager
    def attached(self) -> Iterator[Run]:
        """Let the regions act."""
        denoiser = self.composer._denoiser()
        with ExitStack() as stack:
            if isinstance(self.run, Blending):
                stack.enter_context(self.composer._built().denoiser.attached())
            stack.enter_context(self.run.attached(denoiser))
            yield self.run

    def placed(self) -> tuple[PlacedRegion, ...]:
        """Where the regions were, as pictures."""
        from PIL import Image

        made = []
        for region, place in zip(self.regions, self.places, strict=True):
            pixels = (place.soft(*self.size) * 255).round().to(torch.uint8)
            made.append(PlacedRegion(region.title, place.box, Image.fromarray(pixels.numpy(), "L"), region.adapters))
        return tuple(made)

    def _run(self) -> Run:
        composer, plan, options = self.composer, self.plan, self.options
        denoiser, engine = composer._denoiser(), composer._built().denoiser
        if plan.method == "output":
            grid = latent_grid(composer.family, composer.pipe, *self.size)
            named: dict[Voices, Encoding] = {(row,): encoding for row, encoding in enumerate(self.encodings)}
            return Blending(composer.family, engine.gates, plan.steps, named, self.places, grid, plan.adapter_batch)
        if composer.family.flow:
            factor = composer.pipe.vae_scale_factor * 2
            grid = self.size[0] // factor, self.size[1] // factor
            segment = self.encodings[0].positive["embeds"].shape[1]
            return RegionalTransformer(
                denoiser, engine, plan.steps, self.places, grid, segment, bool(options.self_mask)
            )
        texts = [row_text(encoding) for encoding in self.encodings]
        return RegionalUNet(
            denoiser, engine, plan.steps, texts, self.places, self.hard, bool(options.self_mask), self.asked.guided
        )


def row_text(encoding: Encoding) -> RowText:
    """The text of one picture of an encoding, the same for every layer."""
    negative = encoding.negative
    return RowText(encoding.positive["embeds"][:1], None if negative is None else negative["embeds"][:1])


def check_places(
    places: Sequence[Place], regions: Sequence[Region], grid: tuple[int, int], size: tuple[int, int]
) -> None:
    """Refuse places that a picture of this size does not have.

    Raises:
        InputError: a mask of another shape than the picture, or a region smaller than a cell of the latents.
    """
    titles = [region.title for region in regions]
    masks.check_ratio(places, titles, *size)
    for place, title in zip(places, titles, strict=True):
        if not bool((place.hard(*grid) > 0).any()):
            raise InputError(
                f"The region '{title}' covers no whole cell of the {grid[1]} x {grid[0]} cells that a picture of "
                f"{size[1]} x {size[0]} pixels has: make it or the picture larger."
            )


def cross_part(file: LoraFile, component: str) -> set[str]:
    """The layers of an adapter that the scope "cross" uses."""
    return {name for name in file.parts.get(component, {}) if name.endswith(CROSS_LAYERS)}


def share_outside(file: LoraFile, component: str) -> float:
    """The share of an adapter's squared update norm that the scope "cross" leaves out."""
    inside = cross_part(file, component)
    sizes = {
        name: layer.scale**2 * _product_size(layer.A, layer.B) for name, layer in file.parts.get(component, {}).items()
    }
    total = sum(sizes.values())
    return 1 - sum(sizes[name] for name in inside) / total if total else 0.0


def check_scope(loaded: Sequence[Loaded], component: str) -> list[str]:
    """Warnings about adapters that the scope "cross" hardly uses.

    Raises:
        InputError: an adapter without any cross-attention layer.
    """
    said = []
    for item in loaded:
        name = item.report.name
        if not cross_part(item.file, component):
            raise InputError(
                f"'{name}' has no layer in cross-attention ({', '.join(CROSS_LAYERS)}), so the scope 'cross' would not "
                "use it: choose scope 'spatial' or the method 'activation'."
            )
        share = share_outside(item.file, component)
        if share > 0.5:
            said.append(
                f"{share:.0%} of '{name}' lie outside of cross-attention, and the scope 'cross' leaves that out: "
                "scope 'spatial' or the method 'activation' uses all of it."
            )
    return said


def _product_size(A: Tensor, B: Tensor) -> float:
    """|B A|^2 without making the product."""
    down, up = A.float().flatten(1), B.float().flatten(1)
    return float(((down @ down.T) * (up.T @ up)).sum())
