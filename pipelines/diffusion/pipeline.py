"""MultiLoRAPipeline: one base model, many adapters, one picture.

It holds a diffusers pipeline and never copies its code: adapters act through forward hooks
(:mod:`adapters.layers.gated`), composition through two hooks on the denoiser (:mod:`pipelines.diffusion.denoise`).
All hooks exist only during a call, so before and after it the diffusers pipeline is exactly what it was, also when the
call fails or is cancelled.

    pipe = MultiLoRAPipeline.from_pretrained("tinymoji")
    pipe.load_lora("cat.safetensors", weight=0.8)
    pipe.load_lora("pixel.safetensors", schedule=[(0, 1), (0.5, 1), (0.5, 0), (1, 0)])
    pipe.compose("composite")("a cat in pixel style").images[0].save("cat.png")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from adapters.errors import FamilyError, InputError, nearest
from adapters.formats import LoraFile, read, write_diffusers, write_kohya, write_peft
from adapters.formats.fit import fit
from adapters.formats.words import Words, with_words_of
from adapters.layers.gated import Adapter, GatedAdapters
from adapters.merging.concatenate import Merged, concatenate
from adapters.progress import Monitor, Progress, Silent, check, part
from pipelines.diffusion import methods
from pipelines.diffusion.checks import (
    block_factor,
    check_blocks,
    check_call,
    check_pristine,
    check_prompt,
    check_weight,
)
from pipelines.diffusion.distillation import embedding
from pipelines.diffusion.distillation.mark import Mark
from pipelines.diffusion.distillation.use import Distilled, check_use, distilled, merged_mark
from pipelines.diffusion.families import Encoding, Family, family_of
from pipelines.diffusion.families.configuration import check_base
from pipelines.diffusion.loading import Settings, modern_blocks, open_pipeline
from pipelines.diffusion.methods.situation import Situation
from pipelines.diffusion.methods.step import Step
from pipelines.diffusion.preview import preview
from pipelines.diffusion.regions.region import (
    CROSS_LAYERS,
    REGIONAL,
    SPEAKING,
    PlacedRegion,
    Region,
    RegionOptions,
    check_options,
    check_own_region,
    check_regions,
)
from pipelines.diffusion.report import LoraReport, Plan, report_region
from pipelines.diffusion.samplers import count_steps, sampler
from pipelines.diffusion.schedule import Keyframes, check_keyframes, factor_at
from pipelines.diffusion.text import Voices, resolve_mode, voices_of_step

WRITERS = {"diffusers": write_diffusers, "kohya": write_kohya, "peft": write_peft}
Places = tuple[Region, ...] | Literal["auto", "own"]


@dataclass(frozen=True)
class Output:
    """The pictures of a call (PIL images, or latents if asked), the plan they followed and where its regions were
    (automatic ones: of each picture, one after the other)."""

    images: Any
    plan: Plan
    flagged: tuple[bool, ...] = ()
    regions: tuple[PlacedRegion, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """An adapter as the pipeline keeps it: what it reports, and its layers fitted to the model."""

    report: LoraReport
    file: LoraFile
    distilled: Distilled | None = None


@dataclass(frozen=True)
class Composition:
    """What :meth:`MultiLoRAPipeline.compose` chose; ``adapters`` None means all that are loaded, ``regions`` "own" the
    regions they were loaded with."""

    method: str = "merge"
    adapters: tuple[str, ...] | None = None
    tau: int = 1
    te_mode: str = "auto"
    adapter_batch: int | None = None
    regions: Places = ()
    options: RegionOptions = field(default_factory=RegionOptions)

    @property
    def regional(self) -> bool:
        return self.method in REGIONAL


@dataclass(frozen=True)
class Asked:
    """What a call asks for.

    Attributes:
        size: height and width of the pictures.
        call: what the diffusers pipeline is told unchanged.
    """

    prompt: str
    negative: str
    images: int
    guided: bool
    seed: int
    size: tuple[int, int]
    call: Mapping[str, Any]
    monitor: Monitor
    preview_every: int

    def generators(self) -> list[torch.Generator]:
        """One per picture, so that a picture is the same whatever the number of pictures."""
        return [torch.Generator().manual_seed(self.seed + k) for k in range(self.images)]


Between = Callable[[int, torch.Tensor], dict[str, Any]]
"""(number of the next step, latents) -> what changes before it: {} or {"latents": ...}."""


@dataclass
class Engines:
    """The joined adapters of one composition: for the denoiser and for each text encoder."""

    key: tuple[Any, ...]
    denoiser: GatedAdapters
    text: dict[str, GatedAdapters] = field(default_factory=dict)


class MultiLoRAPipeline:
    """A diffusers pipeline that composes LoRAs.

    Args:
        pipe: a diffusers pipeline of a known family; it is used, not copied.
        settings: how it was opened (made up from ``pipe`` when left out).
    """

    def __init__(self, pipe: Any, settings: Settings | None = None) -> None:
        self.pipe = pipe
        self.family: Family = family_of(pipe)
        self.settings = settings or self._found_settings()
        self._loaded: dict[str, Loaded] = {}
        self._composition = Composition()
        self._engines: Engines | None = None
        check_pristine(pipe, self._components())
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
        **options: Any,
    ) -> MultiLoRAPipeline:
        """Open a hub id, a pipeline directory or a single ``.safetensors`` file.

        Raises:
            InputError: nothing there, an unknown family, or an impossible choice.
        """
        pipe, _, settings = open_pipeline(source, family, dtype, device, attention, memory, **options)
        return cls(pipe, settings)

    # Adapters

    @property
    def adapters(self) -> dict[str, LoraReport]:
        """What is loaded, by name."""
        return {name: loaded.report for name, loaded in self._loaded.items()}

    def load_lora(
        self,
        path: str | Path | LoraFile,
        name: str | None = None,
        weight: float = 1.0,
        te_weight: float | None = None,
        triggers: Sequence[str] = (),
        blocks: Mapping[str, float] | None = None,
        schedule: Keyframes | None = None,
        region: Region | Mapping[str, Any] | None = None,
    ) -> LoraReport:
        """Read an adapter and fit it to this model; every layer of it finds its module, or it is refused.

        Args:
            path: file, PEFT directory, or an adapter already in memory.
            name: how the composition calls it (the file's name if left out).
            weight: strength in the denoiser.
            te_weight: strength in the text encoders (as ``weight`` if left out).
            triggers: words that call it.
            blocks: extra factor per block, by module prefix ("down_blocks.1": 0.5).
            schedule: keyframes (progress, factor).
            region: its own place, without ``adapters``: regional methods use it unless ``compose`` is given regions.

        Raises:
            InputError: unreadable file, unknown format, a name used twice, a number that is not finite, a region that
                cannot be.
            FamilyError: made for another model; names the layer and both shapes.
        """
        file = path if isinstance(path, LoraFile) else read(path)
        chosen = name or (file.path.stem if file.path else "adapter")
        if chosen in self._loaded:
            raise InputError(f"An adapter named '{chosen}' is already loaded; give this one another name.")
        weight = check_weight(weight, f"The weight of '{chosen}'")
        te_weight = weight if te_weight is None else check_weight(te_weight, f"The te_weight of '{chosen}'")
        keyframes = check_keyframes(schedule or (), chosen)
        place = None if region is None else check_own_region(region, chosen)
        base = f"the base model ({self.family.title})"
        fitted = fit(
            modern_blocks(file, getattr(getattr(self.pipe, "unet", None), "config", None)),
            self._models(),
            base,
            tables=False,
        )
        factors = check_blocks(blocks or {}, fitted.parts, self.family.denoiser)
        self._check_words(file, chosen)
        special = distilled(file, chosen, self.pipe, self.family.denoiser)
        report = LoraReport(
            name=chosen,
            path=str(file.path or ""),
            sha256=file.sha256,
            format=file.format,
            layers=fitted.counts(),
            ranks=fitted.ranks(),
            dora=fitted.is_dora(),
            parameters=fitted.parameters(),
            weight=weight,
            te_weight=te_weight,
            triggers=tuple(triggers) or (*file.words, *file.embeddings),
            blocks=factors,
            schedule=keyframes,
            distilled=special.mark if special else None,
            region=place,
        )
        self._loaded[chosen] = Loaded(report, fitted, special)
        self._engines = None
        return report

    def unload_lora(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            InputError: no adapter of that name.
        """
        self._need(name)
        del self._loaded[name]
        self._engines = None
        if self._composition.adapters and name in self._composition.adapters:
            self._composition = Composition()

    # Composition

    def compose(
        self,
        method: str,
        adapters: Sequence[str] | None = None,
        tau: int = 1,
        te_mode: str = "auto",
        adapter_batch: int | None = None,
        regions: str | Sequence[Region | Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> MultiLoRAPipeline:
        """Choose how the adapters are combined in the next calls; returns the pipeline.

        Args:
            method: one of ``pipelines.diffusion.methods``.
            adapters: which of the loaded ones, in order (all if left out).
            tau: switch: steps per turn.
            te_mode: text encoder LoRAs: "auto", "per_adapter", "official" or "merged".
            adapter_batch: composite: adapters denoised together (all if left out); output: regions together.
            regions: parts of the picture with adapters and prompts of their own, or "auto" (regional methods only);
                adapters in no region act everywhere. Left out, each adapter has the region it was loaded with.
            options: how regions are used, see :class:`pipelines.diffusion.regions.RegionOptions`.

        Raises:
            InputError: unknown method, adapter, mode or option; an adapter named twice; a number below 1; regions that
                cannot be.
        """
        methods.find(method)
        resolve_mode(te_mode, method)
        if tau < 1:
            raise InputError(f"tau must be at least 1, got {tau}.")
        if adapter_batch is not None and adapter_batch < 1:
            raise InputError(f"adapter_batch must be at least 1, got {adapter_batch}.")
        chosen = None if adapters is None else tuple(adapters)
        for name in chosen or ():
            self._need(name)
        if chosen and len(set(chosen)) != len(chosen):
            raise InputError(f"An adapter is named twice in the composition: {', '.join(chosen)}.")
        if method in REGIONAL and te_mode != "auto":
            raise InputError(
                f"With regions every prompt is encoded with its own region's adapters: leave te_mode '{te_mode}' out."
            )
        names = tuple(self._loaded) if chosen is None else chosen
        own = regions is None and method in REGIONAL and any(self._loaded[name].report.region for name in names)
        found: Places = "own" if own else check_regions(method, regions, names)
        how = check_options(method, self.family.flow, options)
        if how.refine is None:
            how = replace(how, refine=method == "lora-composer" and self._is_sd15())
        self._composition = Composition(method, chosen, tau, te_mode, adapter_batch, found, how)
        return self

    def plan(
        self,
        steps: int = 25,
        guidance_scale: float | None = None,
        scheduler: str = "default",
        prompt: str | None = None,
    ) -> Plan:
        """What a call with these numbers would do (guidance as in a call; some methods also go by the prompt).

        Raises:
            InputError: the composition cannot be done (for example a DoRA adapter with a fading schedule).
        """
        count = count_steps(sampler(scheduler, self.pipe.scheduler, self.family.flow), steps, self.family.flow)
        guidance, mark = check_use(self._active_marks(), self._composition.method, guidance_scale, True)
        plan, _ = self._planned(count, guidance > 1 and not (mark and mark.mode == "embedding"), prompt)
        return plan

    def export(self, path: str | Path, format: str = "diffusers", rank: int | None = None) -> Merged:
        """Write the composition as one ordinary LoRA (merge without schedules only).

        ``rank`` cuts every layer by SVD; the result names the relative error of each layer that was cut.

        Raises:
            InputError: the composition changes over the steps or has no sum form, or the format is unknown.
        """
        chosen = self._composition
        if format not in WRITERS:
            raise InputError(f"Unknown format '{format}': possible are {', '.join(WRITERS)}.")
        if chosen.method != "merge":
            raise InputError(
                f"'{chosen.method}' changes with the steps and is no single LoRA; only 'merge' can be exported."
            )
        loaded = self._chosen()
        scheduled = [item.report.name for item in loaded if item.report.schedule]
        if scheduled:
            raise InputError(
                f"A schedule ({', '.join(scheduled)}) cannot be written into one LoRA: remove it to export."
            )
        weights = [
            {
                component: item.report.weight if component == self.family.denoiser else item.report.te_weight
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
        WRITERS[format](merged.file, Path(path))
        return merged

    # Pictures

    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        steps: int = 25,
        guidance_scale: float | None = None,
        seed: int = 0,
        images: int = 1,
        width: int | None = None,
        height: int | None = None,
        scheduler: str = "default",
        monitor: Monitor | None = None,
        preview_every: int = 0,
        true_cfg_scale: float = 1.0,
        output_type: str = "pil",
        allow_double_guidance: bool = False,
    ) -> Output:
        """Make pictures; picture k uses the seed ``seed + k`` whatever the number of pictures.

        Args:
            prompt, negative_prompt: what to draw and what to avoid.
            steps: denoising steps.
            guidance_scale: classifier-free guidance (1 = off); Flux: its distilled guidance. Left out it is 5, with a
                distilled adapter 1 (or, if that takes the guidance as an input, what it was made for).
            width, height: pixels; the base model's own size if left out.
            scheduler: sampler by name.
            monitor: is told every step and may cancel.
            preview_every: steps between previews in the reports (0 = none).
            true_cfg_scale: Flux: real guidance with the negative prompt (1 = off).
            output_type: "pil", or "latent" for the denoised latents.
            allow_double_guidance: guide on top of the guidance that a distilled adapter has built in.

        Raises:
            InputError: a number or composition that cannot be done; out of memory (with what to do).
            Cancelled: the monitor asked to stop.
        """
        check_prompt(prompt, "The prompt")
        check_prompt(negative_prompt, "The negative prompt")
        flow_flux = self.family.guidance_input
        wanted = true_cfg_scale if flow_flux else guidance_scale
        guidance, mark = check_use(self._active_marks(), self._composition.method, wanted, allow_double_guidance)
        guidance_scale = 5.0 if flow_flux and guidance_scale is None else guidance_scale if flow_flux else guidance
        assert guidance_scale is not None
        check_call(self.family, self.pipe, steps, guidance_scale, images, (width, height), seed)
        check_pristine(self.pipe, self._components())
        guided = guidance > 1 and not (mark and mark.mode == "embedding")
        size = self._pixels(width, height)
        if width or height:  # diffusers takes both or, without a word, neither
            height, width = size
        call: dict[str, Any] = {
            "width": width, "height": height, "num_inference_steps": steps, "guidance_scale": guidance_scale,
            "output_type": output_type, **({"true_cfg_scale": true_cfg_scale} if flow_flux else {}),
        }  # fmt: skip
        asked = Asked(prompt, negative_prompt, images, guided, seed, size, call, monitor or Silent(), preview_every)
        with torch.no_grad(), self._scheduler(scheduler) as fresh:
            plan, voices = self._planned(count_steps(fresh, steps, self.family.flow), guided, prompt)
            try:
                if self._composition.regional:
                    result, places = self._regional(plan, asked)
                else:
                    result, places = self._everywhere(plan, voices, asked), ()
            except torch.OutOfMemoryError as error:
                raise InputError(self._memory_advice(plan)) from error
        flagged = getattr(result, "nsfw_content_detected", None) or ()
        return Output(result.images, plan, tuple(bool(flag) for flag in flagged), places)

    def __enter__(self) -> MultiLoRAPipeline:
        return self

    def __exit__(self, *problem: object) -> None:
        """Forget all adapters; the diffusers pipeline itself was never changed."""
        self._loaded.clear()
        self._composition = Composition()
        self._engines = None

    # Parts of a call

    def _everywhere(self, plan: Plan, voices: Sequence[Sequence[Voices]], asked: Asked) -> Any:
        """A call whose adapters have no regions; returns what the diffusers pipeline returned."""
        engines = self._built()
        encodings = self._encode(engines, voices, asked)
        given = voices[0][0]
        with self._guidance_input(), engines.denoiser.attached() as gates:
            kind = methods.runner(self._composition.method)
            run = kind(self.family, gates, plan.steps, voices, encodings, given, self._composition.adapter_batch)
            with run.attached(self._denoiser()):
                return self._draw(run, asked, encodings[given].call_arguments(), asked.generators())

    def _regional(self, plan: Plan, asked: Asked) -> tuple[Any, tuple[PlacedRegion, ...]]:
        """A call with regions; returns what the diffusers pipeline returned, and where the regions were."""
        from pipelines.diffusion.regions.run import RegionalCall

        if self._composition.regions == "auto" and asked.images > 1:  # each picture has places of its own
            alone = [
                replace(asked, images=1, seed=asked.seed + k, monitor=part(asked.monitor, k, asked.images))
                for k in range(asked.images)
            ]
            made = [self._regional(plan, one) for one in alone]
            return _joined([result for result, _ in made]), tuple(region for _, places in made for region in places)
        call = RegionalCall(self, plan, self._with_places(self._chosen()), self._composition.options, asked)
        with call.attached() as run:
            generators = asked.generators()
            result = self._draw(run, asked, call.arguments() | call.start(generators), generators, call.between)
        return result, call.placed()

    def _draw(
        self, run: Any, asked: Asked, arguments: Mapping[str, Any], generators: Any, between: Between | None = None
    ) -> Any:
        """Let the diffusers pipeline draw, while ``run`` is attached."""
        return self.pipe(
            **asked.call,
            **arguments,
            generator=generators,
            callback_on_step_end=self._reporter(run, asked, between),
        )

    def encode_rows(
        self, texts: Sequence[tuple[str, str]], regions: Sequence[Region], images: int, guided: bool
    ) -> list[Encoding]:
        """The text of the background and of every region, each by the text encoders with its own adapters.

        Args:
            texts: (prompt, negative prompt), the background's first.
        """
        loaded, engines = self._chosen(), self._built()
        placed = {name for region in regions for name in region.adapters}
        made = []
        with ExitStack() as stack:
            gates = [stack.enter_context(engine.attached()) for engine in engines.text.values()]
            for (prompt, negative), region in zip(texts, (None, *regions), strict=True):
                strengths = []
                for item in loaded:
                    own = region is not None and item.report.name in region.adapters
                    strength = 1.0 if item.report.dora else item.report.te_weight
                    factor = region.scale if region is not None and own else 1.0
                    strengths.append(strength * factor if own or item.report.name not in placed else 0.0)
                for gate in gates:
                    gate.joint(strengths)
                encoding = self._encoded(prompt, negative, images, guided)
                words = self._words(region)
                made.append(self._with_words(encoding, prompt, words) if words else encoding)
        return made

    def _encoded(self, prompt: str, negative: str, images: int, guided: bool) -> Encoding:
        """A prompt and a negative one encoded; the words that adapters of the composition bring are known."""
        from pipelines.diffusion.regions.concepts import speaking, spelled, word_tokens

        words = self._vocabulary()
        with speaking(self.pipe, word_tokens(words)):
            return self.family.encode(
                self.pipe, spelled(prompt, words), spelled(negative, words) or None, images, guided
            )

    def _vocabulary(self) -> Words:
        """The words of pivotal tuning that the composition's adapters bring."""
        return {word: encoders for item in self._chosen() for word, encoders in item.file.words.items()}

    def _words(self, region: Region | None) -> dict[str, torch.Tensor]:
        """The words with an embedding per layer that the region's adapters bring."""
        names = region.adapters if region else ()
        return {word: rows for name in names for word, rows in self._loaded[name].file.embeddings.items()}

    def _with_words(self, encoding: Encoding, prompt: str, words: Mapping[str, torch.Tensor]) -> Encoding:
        """The encoding with one text per cross-attention layer beside it ("layers", (layers, tokens, width))."""
        from pipelines.diffusion.regions.concepts import expanded, layer_tokens, speaking, spelled, word_tokens

        vocabulary = self._vocabulary()
        prompts: Any = expanded(spelled(prompt, vocabulary), words)
        tokens = word_tokens(vocabulary)
        tokens["text_encoder"] = tokens.get("text_encoder", {}) | layer_tokens(words)["text_encoder"]
        with speaking(self.pipe, tokens):
            made = self.family.encode(self.pipe, prompts, None, 1, False)
        return Encoding({**encoding.positive, "layers": made.positive["embeds"]}, encoding.negative)

    def _check_words(self, file: LoraFile, name: str) -> None:
        """Refuse words that this model cannot use, or that are taken."""
        from pipelines.diffusion.regions.concepts import check_layer_words, check_taken, check_words
        from pipelines.diffusion.regions.unet import ordered_blocks

        known = {word for item in self._loaded.values() for word in (*item.file.words, *item.file.embeddings)}
        if file.words:
            widths = {part: getattr(self.pipe, part).config.hidden_size for part in self.family.text_encoders}
            check_words(file.words, {} if self.family.flow else widths, self.family.title, name)
            check_taken(file.words, known, name)
        if file.embeddings:
            if self.family.name != "sd":
                raise FamilyError(
                    f"'{name}' is an ED-LoRA, made for Stable Diffusion 1.x; this is {self.family.title}."
                )
            layers, width = len(ordered_blocks(self._denoiser())), self.pipe.text_encoder.config.hidden_size
            check_layer_words(file.embeddings, layers, width, name)
            check_taken(file.embeddings, known | set(self.pipe.tokenizer.get_vocab()), name)

    def _planned(self, count: int, guided: bool, prompt: str | None = None) -> tuple[Plan, list[list[Voices]]]:
        """The plan of ``count`` steps, and the encoding of each prediction of each step."""
        chosen, loaded = self._composition, self._chosen()
        mode = resolve_mode(chosen.te_mode, chosen.method)
        with_words = [item.report.name for item in loaded if item.file.embeddings]
        if with_words and chosen.method not in SPEAKING:
            raise InputError(
                f"'{with_words[0]}' has a word with an embedding per layer, which only regions inside the network "
                f"read: choose {', '.join(SPEAKING)}."
            )
        strengths = self._strengths(loaded, count)
        regions = self._with_places(loaded)
        steps = methods.plan_steps(
            chosen.method, strengths, tau=chosen.tau, members=self._members(loaded, regions),
            factors=self._factors(loaded, regions, count), situation=self._situation(loaded, prompt),
        )  # fmt: skip
        speaking = {
            i: item.report.te_weight
            for i, item in enumerate(loaded)
            if item.report.te_weight != 0 and any(part != self.family.denoiser for part in item.file.parts)
        }
        voices = [voices_of_step(step, mode, chosen.method, speaking) for step in steps]
        plan = Plan(
            method=chosen.method,
            adapters=tuple(item.report.name for item in loaded),
            te_mode=mode,
            steps=tuple(steps),
            guided=guided,
            adapter_batch=chosen.adapter_batch,
            encodings=len(regions) + 1 if regions else len({voice for row in voices for voice in row}),
            memory=self._built().denoiser.nbytes(),
            regions=tuple(report_region(region) for region in regions),
            options=chosen.options.to_dict() if chosen.regional else {},
            warnings=tuple(self._scope_warnings(loaded, regions)),
        )
        return plan, voices

    def _situation(self, loaded: Sequence[Loaded], prompt: str | None) -> Situation:
        """What methods may look at that weigh adapters by their layers or by the prompt."""

        def embed(text: str) -> torch.Tensor:
            with torch.no_grad():
                return self._encoded(text, "", 1, False).positive["embeds"][0].float().mean(0)

        return Situation(
            names=tuple(item.report.name for item in loaded),
            layers=tuple(item.file.parts.get(self.family.denoiser, {}) for item in loaded),
            triggers=tuple(item.report.triggers for item in loaded),
            prompt=prompt,
            embed=embed,
        )

    def _with_places(self, loaded: Sequence[Loaded]) -> tuple[Region, ...]:
        """The regions; automatic ones are one per adapter, and have no place yet.

        Raises:
            InputError: an adapter was loaded with a region and the method has none, or all such adapters are gone.
        """
        chosen = self._composition
        own = tuple(item.report.region for item in loaded if item.report.region)
        if own and not chosen.regional:
            raise InputError(
                f"'{own[0].title}' was loaded with a region, which '{chosen.method}' has none of: "
                f"compose with {', '.join(REGIONAL)}."
            )
        if chosen.regions == "auto":
            return tuple(Region((item.report.name,)) for item in loaded)
        if chosen.regions == "own":
            check_regions(chosen.method, own, [item.report.name for item in loaded])
            return own
        return chosen.regions

    @staticmethod
    def _members(loaded: Sequence[Loaded], regions: Sequence[Region]) -> list[tuple[int, ...]]:
        """The numbers of the adapters of each region."""
        numbers = {item.report.name: i for i, item in enumerate(loaded)}
        return [tuple(numbers[name] for name in region.adapters) for region in regions]

    @staticmethod
    def _factors(loaded: Sequence[Loaded], regions: Sequence[Region], count: int) -> list[list[float]]:
        """Scale times schedule of every region at every step."""
        rows = [[region.scale * factor_at(region.schedule, k / count) for region in regions] for k in range(count)]
        dora = {item.report.name for item in loaded if item.report.dora}
        for i, region in enumerate(regions):
            faded = next((row[i] for row in rows if row[i] not in (0, 1)), None)
            if faded is not None and dora.intersection(region.adapters):
                raise InputError(
                    f"'{', '.join(dora.intersection(region.adapters))}' is a DoRA adapter: a region may switch it on "
                    f"and off (1 and 0) but not fade it (it asks for {faded:g}); use weight to set its strength."
                )
        return rows

    def _scope_warnings(self, loaded: Sequence[Loaded], regions: Sequence[Region]) -> list[str]:
        if not regions or self._composition.options.scope != "cross":
            return []
        from pipelines.diffusion.regions.run import check_scope

        placed = {name for region in regions for name in region.adapters}
        return check_scope([item for item in loaded if item.report.name in placed], self.family.denoiser)

    def _is_sd15(self) -> bool:
        """A model of Stable Diffusion 1.5's size, for which LoRA-Composer's constants were chosen."""
        widths = getattr(self._denoiser().config, "block_out_channels", ())
        return self.family.name == "sd" and tuple(widths) == (320, 640, 1280, 1280)

    def _strengths(self, loaded: Sequence[Loaded], count: int) -> methods.Strengths:
        """Weight times schedule of every adapter at every step (of a DoRA adapter: the schedule alone, 0 or 1)."""
        rows = []
        for k in range(count):
            row = []
            for item in loaded:
                factor = factor_at(item.report.schedule, k / count)
                if item.report.dora and factor not in (0, 1):
                    raise InputError(
                        f"'{item.report.name}' is a DoRA adapter: its schedule may switch it on and off (1 and 0) but "
                        f"not fade it (it asks for {factor:g}); use weight to set its strength."
                    )
                if item.report.dora:
                    factor = factor if item.report.weight != 0 else 0.0
                else:
                    factor *= item.report.weight
                row.append(factor)
            rows.append(tuple(row))
        return tuple(rows)

    def _built(self) -> Engines:
        """The joined adapters of the current composition (kept until it changes)."""
        loaded = self._chosen()
        key = (self._crossing(), *((item.report.name, item.report.sha256) for item in loaded))
        if self._engines is None or self._engines.key != key:
            made = Engines(key, self._engine(self.family.denoiser, loaded))
            for component in self.family.text_encoders:
                if any(component in item.file.parts for item in loaded):
                    made.text[component] = self._engine(component, loaded)
            self._engines = made
        return self._engines

    def _crossing(self) -> tuple[str, ...]:
        """The adapters that only act in cross-attention."""
        chosen = self._composition
        if not chosen.regional or chosen.options.scope != "cross":
            return ()
        regions = self._with_places(self._chosen())
        return tuple(sorted({name for region in regions for name in region.adapters}))

    def _engine(self, component: str, loaded: Sequence[Loaded]) -> GatedAdapters:
        model = getattr(self.pipe, component)
        strong = "weight" if component == self.family.denoiser else "te_weight"
        crossing = self._crossing() if component == self.family.denoiser else ()
        parts = [
            Adapter(
                layers := {
                    name: layer
                    for name, layer in item.file.parts.get(component, {}).items()
                    if item.report.name not in crossing or name.endswith(CROSS_LAYERS)
                },
                {name: block_factor(f"{component}.{name}", item.report.blocks) for name in layers},
                getattr(item.report, strong) if item.report.dora else 1.0,
            )
            for item in loaded
        ]
        keep = torch.device("cpu") if self.settings.memory == "low" else self.pipe._execution_device
        return GatedAdapters(model, parts, keep, _compute_dtype(model, self.settings))

    def _encode(
        self,
        engines: Engines,
        voices: Sequence[Sequence[Voices]],
        asked: Asked,
    ) -> dict[Voices, Encoding]:
        """The prompt encoded once for every set of text encoder LoRAs that some prediction needs."""
        loaded = self._chosen()
        made: dict[Voices, Encoding] = {}
        with ExitStack() as stack:
            gates = [stack.enter_context(engine.attached()) for engine in engines.text.values()]
            for voice in dict.fromkeys(voice for row in voices for voice in row):
                strengths = [
                    0.0 if i not in voice else 1.0 if item.report.dora else item.report.te_weight
                    for i, item in enumerate(loaded)
                ]
                for gate in gates:
                    gate.joint(strengths)
                made[voice] = self._encoded(asked.prompt, asked.negative, asked.images, asked.guided)
        return made

    @contextmanager
    def _scheduler(self, name: str) -> Iterator[Any]:
        """A fresh sampler in place of the pipeline's own, and no progress bar, for the time of a call."""
        own, bar = self.pipe.scheduler, dict(getattr(self.pipe, "_progress_bar_config", {}))
        fresh = sampler(name, own, self.family.flow)
        try:
            self.pipe.scheduler = fresh
            self.pipe.set_progress_bar_config(disable=True)
            yield fresh
        finally:
            self.pipe.scheduler = own
            self.pipe.set_progress_bar_config(**bar)

    def _reporter(self, run: Any, asked: Asked, between: Between | None) -> Any:
        """diffusers' callback: move to the next step, correct the latents (``between``), report, stop if asked."""
        total, every = len(run.steps), asked.preview_every

        def on_step_end(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            run.step = index + 1
            picture = None
            if every and (index + 1) % every == 0 and index + 1 < total:
                picture = preview(pipe, tensors["latents"], *asked.size)
            asked.monitor.report(Progress("sampling", index + 1, total, preview=picture))
            check(asked.monitor)
            return between(index + 1, tensors["latents"]) if between and index + 1 < total else {}

        return on_step_end

    def _pixels(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Height and width of the pictures of a call."""
        own = getattr(self.pipe, "default_sample_size", None) or self._denoiser().config.sample_size
        own = own if isinstance(own, int) else own[0]
        default = own * self.pipe.vae_scale_factor
        return height or default, width or default

    def _memory_advice(self, plan: Plan) -> str:
        together = self._composition.adapter_batch or len(plan.adapters)
        if plan.method == "composite" and together > 1:
            return (
                f"Out of memory with {together} adapters denoised together: set adapter_batch=1, or memory='balanced'."
            )
        return "Out of memory: use memory='balanced' or 'low', fewer images at once, or a smaller size."

    # Distilled adapters

    def _active_marks(self) -> dict[str, tuple[Mark, float]]:
        """Name -> (mark, weight) of the distilled adapters of the composition that are at work."""
        found = [(item, item.distilled) for item in self._chosen()]
        return {
            item.report.name: (special.mark, item.report.weight)
            for item, special in found
            if special is not None and item.report.weight != 0
        }

    @contextmanager
    def _guidance_input(self) -> Iterator[None]:
        """Inside, the denoiser takes the guidance as an input if the distilled adapter at work needs that."""
        weights = [item.distilled.embedding for item in self._chosen() if item.distilled and item.report.weight != 0]
        with ExitStack() as stack:
            for weight in weights:
                if weight is not None:
                    stack.enter_context(embedding.attached(self._denoiser(), weight))
            yield

    def _merged_entries(self, loaded: Sequence[Loaded]) -> dict[str, str]:
        return merged_mark(
            [(item.distilled.mark, item.report.weight) for item in loaded if item.distilled and item.report.weight != 0]
        )

    # Small things

    def _chosen(self) -> list[Loaded]:
        names = self._composition.adapters
        return list(self._loaded.values()) if names is None else [self._loaded[name] for name in names]

    def _need(self, name: str) -> Loaded:
        if name not in self._loaded:
            known = ", ".join(self._loaded) or "none"
            raise InputError(f"No adapter '{name}' is loaded{nearest(name, self._loaded)}: loaded are {known}.")
        return self._loaded[name]

    def _components(self) -> tuple[str, ...]:
        return (self.family.denoiser, *self.family.text_encoders)

    def _models(self) -> dict[str, nn.Module]:
        """The parts of the base model an adapter may touch."""
        parts = {component: getattr(self.pipe, component, None) for component in self._components()}
        return {component: model for component, model in parts.items() if isinstance(model, nn.Module)}

    def _denoiser(self) -> Any:
        return getattr(self.pipe, self.family.denoiser)

    def _found_settings(self) -> Settings:
        names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
        denoiser = self._denoiser()
        dtype = names.get(denoiser.dtype, str(denoiser.dtype))
        return Settings(type(self.pipe).__name__, self.family.name, dtype, str(self.pipe.device), "as given", "none")


def _joined(results: Sequence[Any]) -> Any:
    """What several calls of a diffusers pipeline returned, as if it were of one."""
    made, images = results[0], [result.images for result in results]
    together = isinstance(images[0], torch.Tensor)
    made.images = torch.cat(images) if together else [picture for part in images for picture in part]
    if getattr(made, "nsfw_content_detected", None):
        made.nsfw_content_detected = [flag for result in results for flag in result.nsfw_content_detected]
    return made


def _compute_dtype(model: Any, settings: Settings) -> torch.dtype:
    """The precision a model computes in (its weights may be stored in fewer bits)."""
    from pipelines.diffusion.loading import DTYPES

    stored: torch.dtype = model.dtype
    return stored if stored in DTYPES.values() else DTYPES[settings.dtype]


__all__ = ["Composition", "LoraReport", "MultiLoRAPipeline", "Output", "Plan", "Step"]
