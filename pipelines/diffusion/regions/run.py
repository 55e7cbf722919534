"""One call with regions: the text of every row, the method's run, and corrections before and between steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adapters.errors import InputError
from adapters.progress import Changed, Progress
from pipelines.diffusion import methods
from pipelines.diffusion.drawing import Request, draw
from pipelines.diffusion.families import Encoding
from pipelines.diffusion.methods.step import Step, TextAdapters
from pipelines.diffusion.regions import masks
from pipelines.diffusion.regions.automatic import assigned
from pipelines.diffusion.regions.blend import Blending
from pipelines.diffusion.regions.capture import Capture, Captured, capture_factor, factors, maps
from pipelines.diffusion.regions.context import RegionContext
from pipelines.diffusion.regions.joint import RegionalTransformer, TextAttention, hidden_texts
from pipelines.diffusion.regions.masks import Place
from pipelines.diffusion.regions.refine import Refinement, loss
from pipelines.diffusion.regions.region import PlacedRegion, Region, RegionOptions
from pipelines.diffusion.regions.reinit import bounds, rearranged
from pipelines.diffusion.regions.unet import RegionalUNet, RowText
from pipelines.diffusion.regions.words import subject_words
from pipelines.diffusion.report import Plan

Run = RegionalUNet | RegionalTransformer | Blending


class RegionalCall:
    """One call with regions.

    Args:
        context: what is needed from the pipeline.
        plan: the steps.
        regions: the regions; automatic ones have no place.
        options: how they are used, fully resolved.
        request: the arguments of the call.
    """

    def __init__(
        self,
        context: RegionContext,
        plan: Plan,
        regions: Sequence[Region],
        options: RegionOptions,
        request: Request,
    ) -> None:
        self.context, self.plan, self.regions, self.options, self.request = context, plan, regions, options, request
        self.size = request.size
        self.grid = context.family.grid(context.pipe, *request.size)
        texts = [(request.prompt, request.negative)]
        texts += [
            (region.prompt or request.prompt, request.negative if region.negative is None else region.negative)
            for region in regions
        ]
        self.counts = context.prompts.counts_of_regions(texts, regions, request.guided)
        self.encodings = context.prompts.by_regions(texts, regions, request.images, request.guided, self.counts)
        automatic = all(region.box is None and region.mask is None for region in regions)
        self.places = self._found() if automatic else [masks.place(region) for region in regions]
        check_places(self.places, regions, self.grid, request.size)
        self.run = self._run(self.plan.steps, self.encodings, self.places)
        self.attention = self._attention() if options.reinit or options.refine else None

    def start(self, generators: Sequence[torch.Generator]) -> dict[str, Any]:
        """The initial latents, if they differ from the usual noise."""
        if self.attention is None:
            return {}
        pipe, scheduler = self.context.pipe, self.context.pipe.scheduler
        scheduler.set_timesteps(self.request.call["num_inference_steps"], device=pipe._execution_device)
        latents = pipe.prepare_latents(
            self.request.images, pipe.unet.config.in_channels, *self.size, self.encodings[0].positive["embeds"].dtype,
            pipe._execution_device, list(generators), None,
        )  # fmt: skip
        begun = self.attention.start(latents)
        # the pipeline multiplies by the sampler's first sigma, which prepare_latents has done already
        return {"latents": begun / scheduler.init_noise_sigma}

    def between(self, step: int, latents: Tensor) -> dict[str, Any]:
        """The latents corrected before step ``step``, if there is a refinement."""
        if self.attention is None or self.attention.refinement is None:
            return {}
        return {"latents": self.attention.refinement(latents, step)}

    def _attention(self) -> Attending:
        """LoRA-Composer's parts that use attention maps."""
        assert isinstance(self.run, RegionalUNet)
        tokens = [self.tokens(region) for region in self.regions]
        return Attending(self.context, self.run, self.options, self.places, self.encodings[0], tokens, self.size)

    def tokens(self, region: Region) -> list[int]:
        """Positions of the words that name a region's subject in its prompt.

        Raises:
            InputError: there are no such words.
        """
        prompt, prompts = region.prompt or self.request.prompt, self.context.prompts
        triggers = [word for name in region.adapters for word in self.context.triggers[name]]
        words = subject_words(region.words, triggers, prompts.read(prompt).words, region.title)
        return prompts.positions(prompt, words, region.title, region, self.counts)

    def _found(self) -> list[Place]:
        """Places of automatic regions, from the attention of the first steps with all adapters everywhere.

        Raises:
            InputError: no words for a subject.
        """
        context, request = self.context, self.request
        tokens = [self.tokens(region) for region in self.regions]
        everywhere = [replace(step, rows=(step.gates,)) for step in self.plan.steps]
        texts = [(request.prompt, request.negative)]
        encoding = context.prompts.by_regions(texts, (), request.images, request.guided, self.counts)
        run, found, grid = self._reading(everywhere, encoding[0])
        count = math.ceil(self.options.auto_steps * len(everywhere))

        def enough(step: int, latents: Tensor) -> dict[str, Any]:
            if step >= count:
                raise Captured
            return {}

        def looking(progress: Progress) -> Progress:
            return replace(progress, stage="looking for places", total=0)

        part = replace(request, monitor=Changed(request.monitor, looking), preview_every=0)
        with run.attached(context.denoiser), suppress(Captured):
            draw(context.pipe, run, part, encoding[0].call_arguments(), part.generators(), enough)
        attention = found()  # (cells, tokens)
        subjects = torch.stack([attention[:, chosen].sum(1).view(grid) for chosen in tokens])
        return [Place(None, mask.cpu()) for mask in assigned(subjects, self.grid)]

    def _reading(
        self, steps: Sequence[Step], encoding: Encoding
    ) -> tuple[RegionalUNet | RegionalTransformer, Callable[[], Tensor], tuple[int, int]]:
        """A run without regions that captures attention to the text, a function that returns it (cells, tokens), and
        the grid of the cells."""
        context, options = self.context, self.options
        denoiser, engine = context.denoiser, context.adapters
        if not context.family.unet:
            joint = self._joint(steps, [encoding], [])
            sample = self.request.images - 1 if context.family.positive_first else -1
            joint.capture = attention = TextAttention(sample)
            return joint, attention.maps, (joint.level.height, joint.level.width)
        run = RegionalUNet(
            denoiser, engine, steps, [row_text(encoding)], [], hard=True, self_mask=False, guided=self.request.guided
        )
        factor = capture_factor(run.unet, self.grid, options.capture)
        layers = [name for name, size in factors(run.unet).items() if size == factor]
        run.capture = capture = Capture(run, layers, [0], stop=False, last=1)
        rows, columns = (-(-side // factor) for side in self.grid)
        return run, lambda: capture.cross_maps()[0, 0], (rows, columns)

    def _joint(
        self, steps: Sequence[Step], encodings: Sequence[Encoding], places: Sequence[Place]
    ) -> RegionalTransformer:
        """A run with regions inside a transformer."""
        context, step = self.context, self.context.family.token_step(self.context.pipe)
        if self.options.self_mask and context.family.layout.linear:
            raise InputError(
                f"Cells of {context.family.title} attend to each other through sums over all of them, which self_mask "
                "cannot divide: leave self_mask out."
            )
        grid = self.size[0] // step, self.size[1] // step
        joined = context.family.joined(encodings)
        hidden = hidden_texts(
            joined, self.request.images, context.family.positive_first, context.family.layout.multiple
        )
        return RegionalTransformer(
            context.denoiser, context.adapters, steps, places, grid, joined.texts, context.family.layout,
            bool(self.options.self_mask), hidden,
        )  # fmt: skip

    @property
    def hard(self) -> bool:
        """Whether cells belong to a region entirely or not at all, as in the paper."""
        return methods.properties(self.plan.method).hard

    def arguments(self) -> dict[str, Any]:
        """The encoded prompt as arguments of the diffusers pipeline."""
        if isinstance(self.run, RegionalTransformer):
            return self.context.family.joined(self.encodings).encoding.call_arguments()
        return self.encodings[0].call_arguments()

    @contextmanager
    def attached(self) -> Iterator[Run]:
        """Inside, the regions act on the denoiser; undone on exit."""
        with ExitStack() as stack:
            if isinstance(self.run, Blending):
                stack.enter_context(self.context.adapters.attached())
            stack.enter_context(self.run.attached(*self.context.denoisers))
            if isinstance(self.run, RegionalTransformer):
                joined = self.context.family.joined(self.encodings)
                stack.enter_context(self.context.family.alone(self.context.pipe, joined, self.request.images, self.run))
            controlnet = getattr(self.context.pipe, "controlnet", None)
            if isinstance(self.run, RegionalTransformer) and controlnet is not None:
                handle = controlnet.register_forward_pre_hook(self._main_text, with_kwargs=True)
                stack.callback(handle.remove)
            yield self.run

    def _main_text(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Give a ControlNet only the text of the whole picture, without the regions' texts that follow it."""
        length = self.encodings[0].positive["embeds"].shape[1]
        cut = {"encoder_hidden_states": kwargs["encoder_hidden_states"][:, :length]}
        if kwargs.get("txt_ids") is not None:
            cut["txt_ids"] = kwargs["txt_ids"][:length]
        return args, {**kwargs, **cut}

    def placed(self) -> tuple[PlacedRegion, ...]:
        """The regions' places, as pictures."""
        from PIL import Image

        made = []
        for region, place in zip(self.regions, self.places, strict=True):
            pixels = (place.soft(*self.size) * 255).round().to(torch.uint8)
            made.append(PlacedRegion(region.title, place.box, Image.fromarray(pixels.numpy(), "L"), region.adapters))
        return tuple(made)

    def _run(self, steps: Sequence[Step], encodings: Sequence[Encoding], places: Sequence[Place]) -> Run:
        context, options = self.context, self.options
        denoiser, engine = context.denoiser, context.adapters
        if methods.properties(self.plan.method).regions == "predictions":
            named: dict[TextAdapters, Encoding] = {(row,): encoding for row, encoding in enumerate(encodings)}
            masked = "mask" in context.family.text_arguments.values()
            batch = self.plan.adapter_batch if masked or equally_long(encodings) else 1
            return Blending(context.family, engine.gates, steps, named, places, self.grid, batch)
        if not context.family.unet:
            return self._joint(steps, encodings, places)
        texts = [row_text(encoding) for encoding in encodings]
        return RegionalUNet(
            denoiser, engine, steps, texts, places, self.hard, bool(options.self_mask), self.request.guided
        )


def equally_long(encodings: Sequence[Encoding]) -> bool:
    """Whether the texts can be in one batch of the denoiser."""
    halves = [(encoding.positive, encoding.negative or {}) for encoding in encodings]
    tensors = [[part for half in both for part in half.values() if isinstance(part, Tensor)] for both in halves]
    return all([part.shape for part in row] == [part.shape for part in tensors[0]] for row in tensors)


class Attending:
    """Re-initialisation and refinement, which use attention maps before and between steps.

    Args:
        context, run, options: of the call.
        places: the regions' places.
        encoding: the background's text, for the forward pass.
        tokens: positions of each region's subject in its prompt.
        size: height and width of the picture in pixels.

    Raises:
        InputError: a size that the grid of the maps does not divide, or a region that is too small for it.
    """

    def __init__(
        self,
        context: RegionContext,
        run: RegionalUNet,
        options: RegionOptions,
        places: Sequence[Place],
        encoding: Encoding,
        tokens: Sequence[Sequence[int]],
        size: tuple[int, int],
    ) -> None:
        self.pipe, self.run, self.options, self.tokens = context.pipe, run, options, tokens
        grid = context.family.grid(context.pipe, *size)
        self.factor = capture_factor(run.unet, grid, options.capture)
        self.layers = [name for name, factor in factors(run.unet).items() if factor == self.factor]
        step = context.pipe.vae_scale_factor * self.factor
        if size[0] % step or size[1] % step:
            raise InputError(
                f"Attention maps need a width and height that are multiples of {step}, got {size[1]} x {size[0]}."
            )
        self.masks = [place.hard(grid[0] // self.factor, grid[1] // self.factor) for place in places]
        for number, mask in enumerate(self.masks, 1):
            check_cells(mask, number, self.factor)
        self.stop = not context.offloaded  # a pass through offloaded layers must not be interrupted
        self.conditions = conditions(context, encoding, size)
        refining = options.refine
        self.refinement = Refinement(len(run.steps), options, self.measure) if refining else None

    def start(self, noise: Tensor) -> Tensor:
        """The initial latents, rearranged and corrected according to the options."""
        if self.options.reinit:
            found = self.maps(noise, 0, with_self=False).cross_maps()  # (batch, regions, cells, tokens)
            rows, columns = self.masks[0].shape
            summed = [found[:, i, :, chosen].sum(-1) for i, chosen in enumerate(self.tokens)]
            attention = torch.stack(summed, 1)
            attention = attention.view(*attention.shape[:2], rows, columns)
            noise = rearranged(noise, attention, self.masks, self.factor)
        return self.refinement(noise, 0) if self.refinement else noise

    def measure(self, latents: Tensor, step: int) -> Tensor:
        """The loss of every sample (batch,)."""
        found = self.maps(latents, step, with_self=self.options.region_loss)
        self_ = found.self_maps() if self.options.region_loss else None
        return loss(found.cross_maps(), self_, self.tokens, self.masks, self.options)

    def maps(self, latents: Tensor, step: int, with_self: bool) -> Capture:
        """The maps of a conditional pass on ``latents`` before step ``step``."""
        scheduler, unet = self.pipe.scheduler, self.run.unet
        time = scheduler.timesteps[step]
        rows = range(1, len(self.masks) + 1)
        capture = Capture(self.run, self.layers, rows, with_self, self.stop)
        sample = scheduler.scale_model_input(latents, time).to(next(unet.parameters()).dtype)
        own = [parameter.requires_grad for parameter in unet.parameters()]
        try:
            unet.requires_grad_(False)
            return maps(self.run, capture, sample, {"timestep": time, **self.conditions})
        finally:
            for parameter, wanted in zip(unet.parameters(), own, strict=True):
                parameter.requires_grad_(wanted)


def conditions(context: RegionContext, encoding: Encoding, size: tuple[int, int]) -> dict[str, Any]:
    """The UNet's arguments besides sample and timestep, for the positive half."""
    text = encoding.positive["embeds"]
    if not context.family.size_input:
        return {"encoder_hidden_states": text}
    pipe, pooled = context.pipe, encoding.positive["pooled"]
    width = pipe.text_encoder_2.config.projection_dim if pipe.text_encoder_2 is not None else pooled.shape[-1]
    ids = pipe._get_add_time_ids(size, (0, 0), size, dtype=text.dtype, text_encoder_projection_dim=width)
    times = ids.to(text.device).repeat(len(text), 1)
    return {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}


def check_cells(mask: Tensor, number: int, factor: int) -> None:
    """Raise :class:`InputError` for a region of fewer than two cells in height or width on the grid of the maps."""
    inside = mask.bool()
    if not bool(inside.any()) or min(bounds(inside)[1] - bounds(inside)[0], bounds(inside)[3] - bounds(inside)[2]) < 2:
        raise InputError(
            f"Region {number} is less than 2 cells high or wide on the grid of attention maps (latents / {factor}): "
            "make it larger, choose a smaller capture, or switch reinit and refine off."
        )


def row_text(encoding: Encoding) -> RowText:
    """The text of an encoding for one picture: one for all layers, or one per layer (ED-LoRA)."""
    negative = encoding.negative
    positive = encoding.positive.get("layers", encoding.positive["embeds"][:1])
    return RowText(positive, None if negative is None else negative["embeds"][:1])


def check_places(
    places: Sequence[Place], regions: Sequence[Region], grid: tuple[int, int], size: tuple[int, int]
) -> None:
    """Check that places fit a picture of ``size`` (height, width) in pixels with latents of ``grid`` cells.

    Raises:
        InputError: a mask with another aspect ratio, or a region that covers no whole cell of the latents.
    """
    titles = [region.title for region in regions]
    masks.check_ratio(places, titles, *size)
    for place, title in zip(places, titles, strict=True):
        if not bool((place.hard(*grid) > 0).any()):
            raise InputError(
                f"The region '{title}' covers no whole cell of the {grid[1]} x {grid[0]} cells of a picture of "
                f"{size[1]} x {size[0]} pixels: make it or the picture larger."
            )
