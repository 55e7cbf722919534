"""MultiLoRAPipeline: one base model, many adapters, one picture.

It wraps a diffusers pipeline and copies none of its code: adapters act through forward hooks
(:mod:`adapters.layers.gated`), composition through two hooks on the denoiser (:mod:`pipelines.diffusion.denoise`).
All hooks exist only during a call, so the diffusers pipeline is otherwise unchanged, also if the call fails or is
cancelled. The work is done by the rack (loaded adapters), the planner (steps), prompts (their encoding) and drawing
(the call).

    pipe = MultiLoRAPipeline.from_pretrained("tinymoji")
    pipe.load_lora("cat.safetensors", weight=0.8)
    pipe.load_lora("pixel.safetensors", schedule=[(0, 1), (0.5, 1), (0.5, 0), (1, 0)])
    pipe.compose("composite")("a cat in pixel style").images[0].save("cat.png")
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from adapters.errors import InputError
from adapters.formats import LoraFile
from adapters.formats.format import find as find_format
from adapters.formats.words import with_words_of
from adapters.merging.accuracy import write_checked
from adapters.merging.concatenate import Merged, concatenate, summands
from adapters.progress import Monitor, Silent, part
from pipelines.diffusion import methods
from pipelines.diffusion.call import Call, Output, check_named, decided, diffusers_arguments, together
from pipelines.diffusion.checks import block_factor, check_call, check_frames, check_pristine, check_prompt
from pipelines.diffusion.denoise import known_calls
from pipelines.diffusion.distillation import embedding
from pipelines.diffusion.distillation.mark import Mark
from pipelines.diffusion.distillation.use import check_use, merged_mark
from pipelines.diffusion.drawing import Request, draw, one_after_the_other, pictures, sampling
from pipelines.diffusion.families import Family, family_of
from pipelines.diffusion.families.configuration import check_base
from pipelines.diffusion.folding import Folds, folds
from pipelines.diffusion.loading import Settings, open_controlnet, open_pipeline
from pipelines.diffusion.memory import free
from pipelines.diffusion.methods.step import Step
from pipelines.diffusion.planner import Composition, Places, Texts, make_plan, placed_regions
from pipelines.diffusion.prompt_syntax import has_choices, without_adapters
from pipelines.diffusion.prompts import Prompts
from pipelines.diffusion.rack import Joined, Loaded, Rack
from pipelines.diffusion.regions.region import PlacedRegion, Region, check_options, check_regions
from pipelines.diffusion.report import LoraReport, Plan
from pipelines.diffusion.samplers import count_part, count_steps, noise_levels
from pipelines.diffusion.schedule import By, Keyframes, Positions
from pipelines.diffusion.text import resolve_mode
from pipelines.diffusion.varied import Strengths, Variant, Varied, check_prompts, check_varied
from pipelines.diffusion.wildcards import lines_of


class MultiLoRAPipeline:
    """A diffusers pipeline that composes LoRAs.

    Args:
        pipe: a diffusers pipeline of a known family; it is used, not copied.
        settings: its settings (default: read from ``pipe``).

    Attributes:
        usual: steps and guidance of a call that asks for none: the base's own, unless set to others.

    Raises:
        InputError: an unknown family, a base that is not supported, or a pipeline that already has adapters.
    """

    def __init__(self, pipe: Any, settings: Settings | None = None) -> None:
        self.pipe = pipe
        self.family: Family = family_of(pipe)
        self.usual = self.family.usual(pipe)
        self.settings = settings or self._found_settings()
        self.rack = Rack(pipe, self.family, self.settings)
        self.composition = Composition()
        check_pristine(pipe, self.rack.components)
        check_base(pipe, self.family)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        family: str = "auto",
        dtype: str = "auto",
        device: str = "auto",
        attention: str = "auto",
        memory: str = "none",
        quantization: str = "none",
        denoiser: str | Path = "",
        **options: Any,
    ) -> MultiLoRAPipeline:
        """Load a hub id, a pipeline directory or a single ``.safetensors`` file.

        Arguments and errors are those of :func:`pipelines.diffusion.loading.open_pipeline`.
        """
        pipe, _, settings = open_pipeline(
            source, family, dtype, device, attention, memory, quantization, denoiser, **options
        )
        return cls(pipe, settings)

    def for_task(self, task: str, **parts: Any) -> MultiLoRAPipeline:
        """The same models and adapters in another pipeline of the family.

        Args:
            task: "image" (to image), "inpaint", "controlnet", "controlnet image", "controlnet inpaint" (SD3:
                "inpainting controlnet", a ControlNet that inpaints by itself), "t2i-adapter".
            parts: what else that pipeline needs (``controlnet``: the network, or its directory or hub id;
                ``adapter``).

        Raises:
            InputError: the family has no such pipeline, or the ControlNet cannot be loaded or is for another model.
        """
        import diffusers

        names = self.family.tasks(self.pipe)
        if task not in names:
            raise InputError(
                f"{self.family.title} has no pipeline for '{task}': it has {', '.join(names) or 'no others'}."
            )
        if names[task] == type(self.pipe).__name__ and not parts:
            return self
        network = parts.get("controlnet")
        if isinstance(network, str | Path):
            parts["controlnet"] = open_controlnet(network, self.pipe, self.family, self.settings.dtype)
        kind = getattr(diffusers, names[task])
        wanted = inspect.signature(kind.__init__).parameters
        own = {name: part for name, part in self.pipe.components.items() if name in wanted}
        plain = {
            name: value
            for name, value in self.pipe.config.items()
            if name in wanted and name not in own and not isinstance(value, tuple | list)
        }
        pipe = kind(**{**plain, **own, **parts})
        pipe.set_progress_bar_config(**getattr(self.pipe, "_progress_bar_config", {}))
        other = MultiLoRAPipeline(pipe, self.settings)
        other.usual = self.usual
        other.rack.loaded, other.composition = dict(self.rack.loaded), self.composition
        return other

    # Adapters

    @property
    def adapters(self) -> dict[str, LoraReport]:
        """Name -> report of the loaded adapter."""
        return {name: loaded.report for name, loaded in self.rack.loaded.items()}

    def load_lora(
        self,
        path: str | Path | LoraFile,
        name: str | None = None,
        weight: float = 1.0,
        te_weight: float | None = None,
        triggers: Sequence[str] = (),
        blocks: Mapping[str, float] | None = None,
        schedule: Keyframes | None = None,
        schedule_by: By = "step",
        region: Region | Mapping[str, Any] | None = None,
        denoiser: str = "",
    ) -> LoraReport:
        """Load an adapter and fit it to this model; it is refused if any of its layers has no module.

        With several denoisers (Wan 2.2), its layers are bound as :mod:`pipelines.diffusion.halves` says.

        Args:
            path: file, PEFT directory, or an adapter in memory.
            name: its name in compositions (default: the file's name).
            weight: strength in the denoiser.
            te_weight: strength in the text encoders (default: ``weight``).
            triggers: its trigger words.
            blocks: extra factor per block, by module prefix ("down_blocks.1": 0.5).
            schedule: keyframes (position, factor), see :mod:`pipelines.diffusion.schedule`.
            schedule_by: "step" (progress from 0 to 1) or "sigma" (the sampler's noise level).
            region: its own region, without ``adapters``; regional methods use it unless ``compose`` is given regions.
            denoiser: attribute of the one denoiser to bind it to ("transformer_2"), instead of what the file says.

        Raises:
            InputError: an unreadable file, an unknown format, a name used twice, a value that is not finite, an
                invalid region, or a file whose other half is missing.
            FamilyError: it was made for another model; the message names the layer and both shapes.
        """
        return self.rack.load(path, name, weight, te_weight, triggers, blocks, schedule, schedule_by, region, denoiser)

    def unload_lora(self, name: str) -> None:
        """Unload an adapter.

        Raises:
            InputError: there is no adapter of that name.
        """
        self.rack.unload(name)
        if self.composition.adapters and name in self.composition.adapters:
            self.composition = Composition()

    # Composition

    def compose(
        self,
        method: str,
        adapters: Sequence[str] | None = None,
        tau: int = 1,
        te_mode: str = "auto",
        adapter_batch: int | None = None,
        regions: str | Sequence[Region | Mapping[str, Any]] | None = None,
        fold: bool = True,
        **options: Any,
    ) -> MultiLoRAPipeline:
        """Choose how the adapters are combined in the next calls; returns the pipeline.

        Args:
            method: one of ``pipelines.diffusion.methods``.
            adapters: names of loaded adapters, in order (default: all).
            tau: for methods with turns, steps per turn.
            te_mode: mode of text encoder LoRAs: "auto", "per_adapter", "official" or "merged".
            adapter_batch: for separate predictions, adapters (or regions) per call of the denoiser (default: all).
            regions: parts of the picture with their own adapters and prompts, or "auto" (regional methods only);
                adapters in no region act everywhere. By default each adapter has the region it was loaded with.
            fold: while strengths stay the same for enough steps, fold the adapters into copies of the weights
                (:mod:`pipelines.diffusion.folding`): faster, and equal up to rounding (in fp16 and bf16 the sums are
                computed in fp32 and rounded once). The model's own weights are not changed.
            options: how regions are used, see :class:`pipelines.diffusion.regions.RegionOptions`.

        Raises:
            InputError: an unknown method, adapter, mode or option; an adapter named twice; a value below 1; or invalid
                regions.
        """
        kind = methods.properties(method)
        resolve_mode(te_mode, method)
        if tau < 1:
            raise InputError(f"tau must be at least 1, got {tau}.")
        if adapter_batch is not None and adapter_batch < 1:
            raise InputError(f"adapter_batch must be at least 1, got {adapter_batch}.")
        chosen = None if adapters is None else tuple(adapters)
        for name in chosen or ():
            self.rack.check(name)
        if chosen and len(set(chosen)) != len(chosen):
            raise InputError(f"An adapter is named twice in the composition: {', '.join(chosen)}.")
        if kind.regional and te_mode != "auto":
            raise InputError(
                f"With regions every prompt is encoded with its own region's adapters: leave out te_mode '{te_mode}'."
            )
        if self.family.video and kind.regional and not self.family.video.regions:
            raise InputError(f"{self.family.short} has no regions, because its sound has no place: leave them out.")
        if self.family.video and regions == "auto":
            raise InputError(
                f"Where a word of the prompt stands is not known for {self.family.title}: give every region a place."
            )
        names = tuple(self.rack.loaded) if chosen is None else chosen
        own = regions is None and kind.regional and any(self.rack.loaded[name].report.region for name in names)
        found: Places = "own" if own else check_regions(method, regions, names)
        how = check_options(method, self.family.flow, options)
        if how.refine is None:
            how = replace(how, refine=kind.parts and self._is_sd15())
        self.composition = Composition(method, chosen, tau, te_mode, adapter_batch, found, how, fold)
        return self

    def plan(
        self,
        steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: str = "default",
        prompt: str | None = None,
        **others: Any,
    ) -> Plan:
        """What a call with these arguments would do; some methods depend on the prompt.

        ``others`` are arguments of a call that skip steps, such as ``strength``.

        Raises:
            InputError: the composition is not possible (for example a DoRA adapter with a fading schedule), or no step
                is left.
        """
        with sampling(self.pipe, scheduler, self.family.flow) as fresh:
            count = self.usual[0] if steps is None else steps
            positions = self._positions(fresh, count, others, self._pixels(None, None, others))
        guidance, mark = self._check_use(guidance_scale, True)
        plan, _ = self._planned(positions, self._guided(guidance, mark), prompt, image=others.get("image"))
        return replace(plan, reports=tuple(item.report for item in self._chosen()))

    def export(self, path: str | Path, format: str = "diffusers", rank: int | None = None) -> Merged:
        """Write the composition as one ordinary LoRA (only merge without schedules).

        ``rank`` truncates every layer by SVD; the result has the relative error of each truncated layer. The file is
        read back and compared with the exact sum (:mod:`adapters.merging.accuracy`).

        Raises:
            InputError: the composition is not a constant sum, the format is unknown or cannot hold it, or the written
                file does not contain the adapters.
        """
        chosen = self.composition
        writer = find_format(format)
        if not chosen.properties.constant:
            able = ", ".join(f"'{name}'" for name in methods.names(lambda known: known.constant))
            raise InputError(
                f"'{chosen.method}' changes over the steps and is not a single LoRA; only {able} can be exported."
            )
        loaded = self._chosen()
        scheduled = [item.report.name for item in loaded if item.report.schedule]
        if scheduled:
            raise InputError(f"A LoRA cannot hold a schedule ({', '.join(scheduled)}): remove it to export.")
        weights = [
            {
                component: item.report.weight if component in self.rack.denoisers else item.report.te_weight
                for component in item.file.parts
            }
            for item in loaded
        ]
        factors = [
            {
                f"{component}.{module}": block_factor(f"{component}.{module}", item.report.blocks)
                for component, module, _ in item.file.layers()
            }
            for item in loaded
        ]
        merged = concatenate([item.file for item in loaded], weights, factors, rank)
        file = with_words_of(merged.file, [item.file for item in loaded])
        merged = replace(merged, file=replace(file, metadata=self._merged_entries(loaded)))
        sums = summands([item.file for item in loaded], weights, factors)
        _, accuracy = write_checked(merged.file, Path(path), writer.name, sums, exact=not merged.errors)
        return replace(merged, accuracy=accuracy)

    # Pictures

    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        images: int | None = None,
        width: int | None = None,
        height: int | None = None,
        scheduler: str = "default",
        monitor: Monitor | None = None,
        preview_every: int = 0,
        true_cfg_scale: float = 1.0,
        output_type: str = "pil",
        allow_double_guidance: bool = False,
        wildcards: str | Path | None = None,
        strengths: Sequence[Strengths] = (),
        frames: int | None = None,
        prompts: Sequence[str] = (),
        **others: Any,
    ) -> Output:
        """Generate pictures; picture k uses the seed ``seed + k`` for any number of pictures.

        Args:
            prompt, negative_prompt: what to draw and what to avoid, with the syntax of
                :mod:`pipelines.diffusion.prompt_syntax`: ``(word:1.3)``; ``<lora:name:0.8>`` sets the strength of a
                loaded adapter for this call; the seed of each picture makes the choices in ``{a|b}``, ``__colour__``.
            steps: denoising steps (default: the base's usual number, 25 for most).
            guidance_scale: classifier-free guidance as the diffusers pipeline takes it (1 = off; Z-Image: 0 = off);
                for Flux its distilled guidance. The default is the base's usual one (5 for most), and with a distilled
                adapter none (or what it was made for, if it takes the guidance as an input).
            seed: of the first picture.
            images: number of pictures (default: 1).
            width, height: in pixels (default: the base model's own size).
            scheduler: name of the sampler; "default" = the base's own.
            monitor: receives progress per step and may cancel.
            preview_every: steps between previews in the progress (0 = none).
            true_cfg_scale: for Flux, true guidance with the negative prompt (1 = off).
            output_type: "pil", or "latent" for the denoised latents.
            allow_double_guidance: allow guidance on top of that built into a distilled adapter.
            wildcards: folder with a file colour.txt for the wildcard ``__colour__``.
            strengths: for each picture, adapter -> (weight, te_weight) instead of those it was loaded with; they are
                still one batch (only text to image with merge).
            frames: of each video (default: the family's own number).
            prompts: for each picture, its own instead of ``prompt``; only with ``strengths``, and without
                ``<lora:...>``.
            others: diffusers' own names: ``num_inference_steps`` (steps), ``num_images_per_prompt`` or
                ``num_videos_per_prompt`` (images), ``num_frames`` (frames), ``generator`` (one, or one per picture;
                instead of the seed), ``callback_on_step_end`` with ``callback_on_step_end_tensor_inputs``,
                ``latents``; and other arguments of the wrapped pipeline (``eta``, ``image``, ``mask_image``,
                ``strength``, ``ip_adapter_image`` ...). A ControlNet gets the encoding of the first prediction.

        Raises:
            InputError: an argument or composition that is not possible, or out of memory (with what to do).
            Cancelled: the monitor asked to stop.
        """
        check_prompt(prompt, "The prompt")
        check_prompt(negative_prompt, "The negative prompt")
        ours = diffusers_arguments(self.pipe, others, {"steps": steps, "images": images, "frames": frames})
        call = Call(
            prompt, negative_prompt, ours.get("steps", self.usual[0]), guidance_scale, seed,
            ours.get("images", 1), width, height, scheduler, monitor or Silent(), preview_every, true_cfg_scale,
            output_type, allow_double_guidance, ours.get("generator"), ours.get("callback_on_step_end"),
            tuple(ours.get("callback_on_step_end_tensor_inputs", ())), tuple(strengths), ours["more"],
            check_frames(self.family, ours.get("frames")), tuple(prompts),
        )  # fmt: skip
        if call.prompts:
            check_prompts(call.prompts, call.images, bool(call.strengths))
        if call.strengths:
            loaded = {item.report.name: item for item in self._chosen()}
            check_varied(call.strengths, call.images, self.composition.method, self._ordinary, loaded)
        lines = lines_of(None if wildcards is None else Path(wildcards))
        regions = placed_regions(self.composition, self._chosen())
        texts = [text or "" for region in regions for text in (region.prompt, region.negative)]
        alone = call.images > 1 and not self._ordinary  # other pipelines repeat their pictures in their own ways
        if not alone and not any(has_choices(text) for text in (prompt, negative_prompt, *call.prompts, *texts)):
            return self._make(call)
        own = self.composition
        made = []
        try:
            for one in call.each():
                if own.regions not in ((), "auto"):
                    self.composition = replace(own, regions=decided(regions, one.seed, lines))
                made.append(self._make(one.decided(lines)))
        finally:
            self.composition = own
        return together(made)

    def _make(self, call: Call) -> Output:
        """The pictures of a call whose texts have no open choices."""
        prompt, adapters = without_adapters(call.prompt)
        regions = placed_regions(self.composition, self._chosen())
        others = [text or "" for region in regions for text in (region.prompt, region.negative)]
        check_named(adapters, [call.negative_prompt, *others], [item.report.name for item in self._chosen()])
        named = {adapter.name: adapter.strengths for adapter in adapters}
        with self.rack.at(named):
            return self._draw(replace(call, prompt=prompt))

    def _draw(self, call: Call) -> Output:
        """The pictures of a call whose prompt names no adapters."""
        flow_flux = self.family.guidance_input
        if not self.family.takes_guidance(self.pipe) and (call.guidance_scale or 1) > 1:
            raise InputError("This base is distilled and takes no guidance: leave guidance_scale out, or set it to 1.")
        wanted = call.true_cfg_scale if flow_flux else self._wanted_guidance(call)
        guidance, mark = self._check_use(wanted, call.allow_double_guidance)
        scale = (self.usual[1] if call.guidance_scale is None else call.guidance_scale) if flow_flux else guidance
        width, height = call.width, call.height
        check_call(self.family, self.pipe, call.steps, scale, call.images, (width, height), call.seed)
        check_pristine(self.pipe, self.rack.components)
        guided = self._guided(guidance, mark)
        size = self._pixels(width, height, call.more)
        # diffusers silently ignores one without the other; without a size of its own it takes a fixed one
        if width or height or call.more.get("image") is not None or self.family.own_cells(self.pipe) is None:
            height, width = size
        size = self.family.drawn_size(self.pipe, *size)
        sized = "width" in inspect.signature(type(self.pipe).__call__).parameters
        self._check_more(call, size, sized)
        real_guidance = flow_flux and "true_cfg_scale" in self.own_arguments
        if flow_flux and call.true_cfg_scale != 1 and not real_guidance:
            raise InputError(f"A {type(self.pipe).__name__} takes no true_cfg_scale: leave it at 1.")
        always = {name: value for name, value in self.family.always.items() if name in self.own_arguments}
        arguments: dict[str, Any] = {
            **always, **(self.family.size_arguments(self.pipe, height, width) if sized else {}), **call.more,
            "num_inference_steps": call.steps, self.family.guidance_argument: scale,
            "output_type": call.output_type, **({"num_frames": call.frames} if call.frames else {}),
            **({"true_cfg_scale": call.true_cfg_scale} if real_guidance else {}),
        }  # fmt: skip
        request = Request(
            call.prompt, call.negative_prompt, call.images, guided, call.seed, size, arguments, call.monitor,
            call.preview_every, call.generators, call.callback, call.callback_tensors,
            image=call.more.get("image"),
        )  # fmt: skip
        with torch.no_grad(), sampling(self.pipe, call.scheduler, self.family.flow) as fresh:
            positions = self._positions(fresh, call.steps, call.more, size)
            request = replace(request, noise=tuple(positions.sigma))
            plan, texts = self._planned(positions, guided, call.prompt, call.negative_prompt, request.image)
            try:
                if call.strengths:
                    plan, result = self._varied(positions, request, call.strengths, call.prompts)
                    places: tuple[PlacedRegion, ...] = ()
                elif self.composition.properties.regional:
                    result, places = self._regional(plan, request)
                else:
                    result, places = self._everywhere(plan, texts, request), ()
            except ImportError as error:
                raise InputError(f"diffusers' {type(self.pipe).__name__} lacks a package: {error}") from None
            except torch.OutOfMemoryError as error:
                raise InputError(_memory_advice(plan)) from error
        flagged = getattr(result, "nsfw_content_detected", None) or ()
        sound = self.family.sound(self.pipe, result)
        return Output(pictures(result), plan, tuple(bool(flag) for flag in flagged), places, sound)

    def __enter__(self) -> MultiLoRAPipeline:
        return self

    def __exit__(self, *problem: object) -> None:
        """Unload all adapters; the diffusers pipeline itself was never changed."""
        self.rack.clear()
        self.composition = Composition()

    # Parts of a call

    def _wanted_guidance(self, call: Call) -> float | None:
        """The guidance by a second pass that a call asks for; None = not said."""
        if self.family.guidance_argument == "guidance_scale" or call.true_cfg_scale == 1:
            return call.guidance_scale
        if call.guidance_scale not in (None, call.true_cfg_scale):
            raise InputError(
                f"guidance_scale and true_cfg_scale mean the same for {self.family.title}, and differ: leave one out."
            )
        return call.true_cfg_scale

    def _check_use(self, guidance: float | None, allow_double: bool) -> tuple[float, Mark | None]:
        """The guidance of a call, and the mark of the distilled adapter in use."""
        family = self.family
        off = 1.0 if family.guidance_input else family.no_guidance
        usual = 5.0 if family.guidance_input else self.usual[1]
        return check_use(self._active_marks(), self.composition.method, guidance, allow_double, usual, off)

    def _guided(self, guidance: float, mark: Mark | None) -> bool:
        """Whether every prediction has two halves."""
        return guidance > self.family.no_guidance and not (mark and mark.mode == "embedding")

    def _count(self, fresh: Any, steps: int, more: Mapping[str, Any]) -> int:
        """Number of denoiser calls; raises :class:`InputError` if no step is left.

        Args:
            fresh: the call's sampler, already set in the pipeline.
        """
        if self._ordinary and not more:
            count = count_steps(fresh, steps, self.family.flow)
        else:
            count = count_part(self.pipe, steps, more, self.family.flow)
        if count < 1:
            raise InputError(f"Of {steps} steps none is left at this strength: use more steps, or a larger strength.")
        return count

    def _positions(self, fresh: Any, steps: int, more: Mapping[str, Any], size: tuple[int, int]) -> Positions:
        """The positions of the denoiser calls; noise levels only if a schedule needs them.

        Args:
            fresh: the call's sampler, already set in the pipeline.
            size: height and width in pixels.

        Raises:
            InputError: no step is left.
        """
        count = self._count(fresh, steps, more)
        loaded = self._chosen()
        placed = placed_regions(self.composition, loaded) if self.composition.properties.regional else ()
        by = [*(item.report.schedule_by for item in loaded), *(region.schedule_by for region in placed)]
        progress = [k / count for k in range(count)]
        if "sigma" not in by:
            return Positions(progress)
        return Positions(progress, noise_levels(self.pipe, self.family, steps, more, size)[-count:])

    def _most_together(self) -> int | None:
        """Most predictions with gates of their own in one call of the denoiser; None = any number."""
        flat, denoiser = self.family.flat_layers, self.family.denoiser
        layers = [name for item in self._chosen() for name in item.file.parts.get(denoiser, {})]
        if flat and any(re.fullmatch(flat, name) for name in layers):
            return 1
        return self.family.most_together(self.pipe)

    def joined(self) -> Joined:
        """The joined adapters of the composition, for the denoiser and for each text encoder."""
        return self.rack.joined(self.composition.adapters, self.composition.cross_only(self._chosen()))

    def region_context(self, image: Any = None) -> Any:
        """The :class:`pipelines.diffusion.regions.context.RegionContext` of this pipeline, for calls with regions.

        ``image`` is the picture of a base that edits pictures.
        """
        from pipelines.diffusion.regions.context import RegionContext

        return RegionContext(
            self.pipe, self.family, tuple(self.rack.denoisers.values()), self.joined().denoiser, self._prompts(image),
            {name: report.triggers for name, report in self.adapters.items()}, self.settings.memory == "low",
        )  # fmt: skip

    def _planned(
        self,
        positions: Positions,
        guided: bool,
        prompt: str | None = None,
        negative: str = "",
        image: Any = None,
    ) -> tuple[Plan, Texts]:
        prompts, memory = self._prompts(image), self.joined().denoiser.nbytes()
        words = None if prompt is None else prompts.read(prompt).words
        plan, texts = make_plan(
            self.composition, self._chosen(), self.family, positions, guided, memory, words, prompts.mean,
            tuple(self.rack.denoisers),
        )  # fmt: skip
        most = self._most_together()
        if most is not None:
            plan = replace(plan, adapter_batch=min(most, plan.adapter_batch or most))
        plan = replace(plan, folds=self._folds(plan))
        if prompt is None:
            return plan, texts
        regions = placed_regions(self.composition, self._chosen())
        written = [prompt, *(region.prompt for region in regions)]
        written += [negative, *(region.negative or "" for region in regions)] if guided else []
        return replace(plan, warnings=(*plan.warnings, *prompts.remarks(written))), texts

    def _folds(self, plan: Plan) -> Folds:
        """What a call with this plan folds into the weights."""
        if not self.composition.fold or self.composition.properties.regional:
            return Folds()
        engine = self.joined().denoiser
        calls = known_calls(methods.runner(plan.method), plan.steps, plan.adapter_batch)
        device = engine.gates.strengths.device
        own = [weight for model in self.rack.denoisers.values() for weight in model.parameters()]
        to_come = sum(weight.nbytes for weight in own if weight.device != device)
        return folds(calls, engine.foldable_bytes(), free(device) - to_come)

    def _everywhere(self, plan: Plan, texts: Texts, request: Request) -> Any:
        """A call without regions; returns the diffusers pipeline's result."""
        encodings = self._prompts(request.image).by_adapters(
            [active for row in texts for active in row],
            request.prompt, request.negative, request.images, request.guided,
        )  # fmt: skip
        given = texts[0][0]
        kind = methods.runner(plan.method)
        with self._guidance_input(), self.joined().denoiser.attached(fold=plan.folds.settings) as gates:
            run = kind(self.family, gates, plan.steps, texts, encodings, given, plan.adapter_batch)
            with run.attached(*self.rack.denoisers.values()):
                return draw(self.pipe, run, request, encodings[given].call_arguments(), request.generators())

    def _varied(
        self, positions: Positions, request: Request, strengths: Sequence[Strengths], prompts: Sequence[str] = ()
    ) -> tuple[Plan, Any]:
        """A call in which every picture has its own strengths (and prompt); the plan of the first, diffusers' result.

        Raises:
            InputError: the base, or a layer that an adapter changes, takes the pictures of a batch together.
        """
        if self._most_together() == 1:
            raise InputError(
                "Pictures with strengths of their own cannot share a batch here, because the base or a layer that an "
                "adapter changes takes all of them together: make one picture at a time."
            )
        variants, plans = [], []
        for one, prompt in zip(strengths, prompts or [request.prompt] * len(strengths), strict=True):
            with self.rack.at(one):
                plan, texts = self._planned(positions, request.guided, prompt, request.negative, request.image)
                active = texts[0][0]
                known = self._prompts(request.image).by_adapters([active], prompt, request.negative, 1, request.guided)
                variants.append(Variant(plan.steps, known[active]))
                plans.append(replace(plan, folds=Folds()))
        with self.joined().denoiser.attached() as gates:
            run = Varied(self.family, gates, variants)
            with run.attached(*self.rack.denoisers.values()):
                arguments = run.encodings[run.given].call_arguments()
                return plans[0], draw(self.pipe, run, request, arguments, request.generators())

    def _regional(self, plan: Plan, request: Request) -> tuple[Any, tuple[PlacedRegion, ...]]:
        """A call with regions; returns the diffusers pipeline's result, and the regions' places."""
        from pipelines.diffusion.regions.run import RegionalCall

        if self.composition.regions == "auto" and request.images > 1:  # each picture has its own places
            alone = [
                replace(request, images=1, seed=request.seed + k, monitor=part(request.monitor, k, request.images))
                for k in range(request.images)
            ]
            made = [self._regional(plan, one) for one in alone]
            places = tuple(region for _, placed in made for region in placed)
            return one_after_the_other([result for result, _ in made]), places
        regions = placed_regions(self.composition, self._chosen())
        call = RegionalCall(self.region_context(request.image), plan, regions, self.composition.options, request)
        with call.attached() as run:
            generators = request.generators()
            arguments = call.arguments() | call.start(generators)
            result = draw(self.pipe, run, request, arguments, generators, call.between)
        return result, call.placed()

    def _prompts(self, image: Any = None) -> Prompts:
        return Prompts(self.pipe, self.family, self._chosen(), self.joined().text, image)

    def _chosen(self) -> list[Loaded]:
        return self.rack.chosen(self.composition.adapters)

    # Distilled adapters

    def _active_marks(self) -> dict[str, tuple[Mark, float]]:
        """Name -> (mark, weight) of the composition's distilled adapters, except those of weight 0."""
        return {
            item.report.name: (special.mark, item.report.weight)
            for item in self._chosen()
            if (special := item.active_distilled) is not None
        }

    @contextmanager
    def _guidance_input(self) -> Iterator[None]:
        """Inside, the denoiser takes the guidance as an input, if a distilled adapter needs that."""
        with ExitStack() as stack:
            for item in self._chosen():
                if (special := item.active_distilled) is not None and special.embedding is not None:
                    stack.enter_context(embedding.attached(self.rack.denoiser, special.embedding))
            yield

    def _merged_entries(self, loaded: Sequence[Loaded]) -> dict[str, str]:
        return merged_mark(
            [(special.mark, item.report.weight) for item in loaded if (special := item.active_distilled) is not None]
        )

    # Small things

    @property
    def own_arguments(self) -> dict[str, Any]:
        """Arguments of the wrapped diffusers pipeline's call, with their defaults."""
        return {name: item.default for name, item in inspect.signature(type(self.pipe).__call__).parameters.items()}

    @property
    def _ordinary(self) -> bool:
        """Whether the diffusers pipeline is the family's text-to-image pipeline."""
        return type(self.pipe).__name__ == self.family.pipeline

    def _is_sd15(self) -> bool:
        """Whether the model has Stable Diffusion 1.5's size, for which LoRA-Composer's constants were chosen."""
        widths = getattr(self.rack.denoiser.config, "block_out_channels", ())
        return self.family.name == "sd" and tuple(widths) == (320, 640, 1280, 1280)

    def _check_more(self, call: Call, size: tuple[int, int], sized: bool) -> None:
        """Raise :class:`InputError` for arguments that do not go together."""
        step = self.family.pixel_step(self.pipe)
        if self.family.edits(self.pipe) and call.more.get("image") is None:
            raise InputError("This base edits pictures: give one to edit (image).")
        if not sized and (call.width or call.height) and size != self._pixels(None, None, call.more):
            raise InputError("The picture has the size of the image: leave width and height out, or resize the image.")
        if size[0] % step or size[1] % step:
            raise InputError(f"The image must be a multiple of {step} pixels wide and high, got {size[1]} x {size[0]}.")
        ip_adapter = getattr(self.rack.denoiser.config, "encoder_hid_dim_type", None) == "ip_image_proj"
        if ip_adapter and not {"ip_adapter_image", "ip_adapter_image_embeds"} & set(call.more):
            raise InputError("This pipeline has an IP-Adapter: give ip_adapter_image, or unload_ip_adapter() first.")
        known, options = self.composition.properties, self.composition.options
        if ip_adapter and known.regions == "network":
            raise InputError(f"'{self.composition.method}' does not work with an IP-Adapter: choose 'output'.")
        if known.regional and (options.reinit or options.refine) and not self._ordinary:
            raise InputError(
                f"reinit and refine of '{self.composition.method}' start from noise: switch both off "
                "(reinit=False, refine=False) with this pipeline."
            )

    def _pixels(
        self, width: int | None, height: int | None, more: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[int, int]:
        """Height and width of the pictures of a call: as requested, of the given image, or the base model's own."""
        image = more.get("image", more.get("control_image"))
        if image is not None and not (width or height):
            return self.family.size_from(self.pipe, image)
        own = self.family.size(self.pipe)
        return height or own[0], width or own[1]

    def _found_settings(self) -> Settings:
        names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
        denoiser = getattr(self.pipe, self.family.denoiser)
        dtype = names.get(denoiser.dtype, str(denoiser.dtype))
        return Settings(type(self.pipe).__name__, self.family.name, dtype, str(self.pipe.device), "as given", "none")


def _memory_advice(plan: Plan) -> str:
    together = min(plan.adapter_batch or len(plan.adapters), max((step.forwards for step in plan.steps), default=1))
    folded = plan.folds.memory / 2**20
    more = f" fold=False takes {folded:.0f} MiB less." if folded >= 1 else ""
    if together > 1 and not plan.regions:
        return (
            f"Out of memory with {together} adapters denoised together: set adapter_batch=1, or memory='balanced'."
            + more
        )
    return "Out of memory: use memory='balanced' or 'low', fewer images at once, or a smaller size." + more


__all__ = ["Composition", "LoraReport", "MultiLoRAPipeline", "Output", "Plan", "Step"]
