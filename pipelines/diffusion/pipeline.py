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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.errors import InputError, nearest
from adapters.formats import LoraFile, read, write_diffusers, write_kohya, write_peft
from adapters.formats.fit import fit
from adapters.layers.gated import Adapter, GatedAdapters
from adapters.merging.concatenate import Merged, concatenate
from adapters.progress import Monitor, Progress, Silent, check
from pipelines.diffusion import methods
from pipelines.diffusion.checks import block_factor, check_blocks, check_call, check_pristine, check_weight
from pipelines.diffusion.denoise import Denoising
from pipelines.diffusion.families import Encoding, Family, family_of
from pipelines.diffusion.loading import Settings, modern_blocks, open_pipeline
from pipelines.diffusion.methods.step import Step
from pipelines.diffusion.preview import preview
from pipelines.diffusion.report import LoraReport, Plan
from pipelines.diffusion.samplers import count_steps, sampler
from pipelines.diffusion.schedule import Keyframes, check_keyframes, factor_at
from pipelines.diffusion.text import Voices, resolve_mode, voices_of_step

WRITERS = {"diffusers": write_diffusers, "kohya": write_kohya, "peft": write_peft}


@dataclass(frozen=True)
class Output:
    """The pictures of a call (PIL images, or latents if asked) and the plan they followed."""

    images: Any
    plan: Plan
    flagged: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """An adapter as the pipeline keeps it: what it reports, and its layers fitted to the model."""

    report: LoraReport
    file: LoraFile


@dataclass(frozen=True)
class Composition:
    """What :meth:`MultiLoRAPipeline.compose` chose; ``adapters`` None means all that are loaded."""

    method: str = "merge"
    adapters: tuple[str, ...] | None = None
    tau: int = 1
    te_mode: str = "auto"
    adapter_batch: int | None = None


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

        Raises:
            InputError: unreadable file, unknown format, a name used twice, a number that is not finite.
            FamilyError: made for another model; names the layer and both shapes.
        """
        file = path if isinstance(path, LoraFile) else read(path)
        chosen = name or (file.path.stem if file.path else "adapter")
        if chosen in self._loaded:
            raise InputError(f"An adapter named '{chosen}' is already loaded; give this one another name.")
        weight = check_weight(weight, f"The weight of '{chosen}'")
        te_weight = weight if te_weight is None else check_weight(te_weight, f"The te_weight of '{chosen}'")
        keyframes = check_keyframes(schedule or (), chosen)
        base = f"the base model ({self.family.title})"
        fitted = fit(
            modern_blocks(file, getattr(getattr(self.pipe, "unet", None), "config", None)), self._models(), base
        )
        factors = check_blocks(blocks or {}, fitted.parts, self.family.denoiser)
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
            triggers=tuple(triggers),
            blocks=factors,
            schedule=keyframes,
        )
        self._loaded[chosen] = Loaded(report, fitted)
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
    ) -> MultiLoRAPipeline:
        """Choose how the adapters are combined in the next calls; returns the pipeline.

        Args:
            method: one of ``pipelines.diffusion.methods``.
            adapters: which of the loaded ones, in order (all if left out).
            tau: switch: steps per turn.
            te_mode: text encoder LoRAs: "auto", "per_adapter", "official" or "merged".
            adapter_batch: composite: adapters denoised together (all if left out).

        Raises:
            InputError: unknown method, adapter or mode; an adapter named twice; a number below 1.
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
        self._composition = Composition(method, chosen, tau, te_mode, adapter_batch)
        return self

    def plan(self, steps: int = 25, guidance_scale: float = 5.0, scheduler: str = "default") -> Plan:
        """What a call with these numbers would do.

        Raises:
            InputError: the composition cannot be done (for example a DoRA adapter with a fading schedule).
        """
        count = count_steps(sampler(scheduler, self.pipe.scheduler, self.family.flow), steps, self.family.flow)
        plan, _ = self._planned(count, guidance_scale > 1)
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
        WRITERS[format](merged.file, Path(path))
        return merged

    # Pictures

    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        steps: int = 25,
        guidance_scale: float = 5.0,
        seed: int = 0,
        images: int = 1,
        width: int | None = None,
        height: int | None = None,
        scheduler: str = "default",
        monitor: Monitor | None = None,
        preview_every: int = 0,
        true_cfg_scale: float = 1.0,
        output_type: str = "pil",
    ) -> Output:
        """Make pictures; picture k uses the seed ``seed + k`` whatever the number of pictures.

        Args:
            prompt, negative_prompt: what to draw and what to avoid.
            steps: denoising steps.
            guidance_scale: classifier-free guidance (1 = off); Flux: its distilled guidance.
            width, height: pixels; the base model's own size if left out.
            scheduler: sampler by name.
            monitor: is told every step and may cancel.
            preview_every: steps between previews in the reports (0 = none).
            true_cfg_scale: Flux: real guidance with the negative prompt (1 = off).
            output_type: "pil", or "latent" for the denoised latents.

        Raises:
            InputError: a number or composition that cannot be done; out of memory (with what to do).
            Cancelled: the monitor asked to stop.
        """
        monitor = monitor or Silent()
        check_call(self.family, self.pipe, steps, guidance_scale, images, (width, height), seed)
        check_pristine(self.pipe, self._components())
        flow_flux = self.family.name == "flux"
        guided = (true_cfg_scale if flow_flux else guidance_scale) > 1
        with torch.no_grad(), self._scheduler(scheduler) as fresh:
            plan, voices = self._planned(count_steps(fresh, steps, self.family.flow), guided)
            engines = self._built()
            try:
                encodings = self._encode(engines, voices, prompt, negative_prompt or None, images, guided)
                arguments: dict[str, Any] = dict(encodings[voices[0][0]].call_arguments())
                generators = [torch.Generator().manual_seed(seed + k) for k in range(images)]
                size = {"width": width, "height": height}
                if flow_flux:
                    arguments |= {"true_cfg_scale": true_cfg_scale}
                with ExitStack() as stack:
                    gates = stack.enter_context(engines.denoiser.attached())
                    run = Denoising(
                        self.family, gates, plan.steps, voices, encodings, voices[0][0], self._composition.adapter_batch
                    )
                    stack.enter_context(run.attached(self._denoiser()))
                    result = self.pipe(
                        **arguments,
                        **size,
                        num_inference_steps=steps,
                        guidance_scale=guidance_scale,
                        generator=generators,
                        output_type=output_type,
                        callback_on_step_end=self._reporter(run, monitor, len(plan.steps), preview_every, size),
                    )
            except torch.OutOfMemoryError as error:
                raise InputError(self._memory_advice(plan)) from error
        flagged = getattr(result, "nsfw_content_detected", None) or ()
        return Output(result.images, plan, tuple(bool(flag) for flag in flagged))

    def __enter__(self) -> MultiLoRAPipeline:
        return self

    def __exit__(self, *problem: object) -> None:
        """Forget all adapters; the diffusers pipeline itself was never changed."""
        self._loaded.clear()
        self._composition = Composition()
        self._engines = None

    # Parts of a call

    def _planned(self, count: int, guided: bool) -> tuple[Plan, list[list[Voices]]]:
        """The plan of ``count`` steps, and the encoding of each prediction of each step."""
        chosen, loaded = self._composition, self._chosen()
        mode = resolve_mode(chosen.te_mode, chosen.method)
        steps = methods.plan_steps(chosen.method, self._strengths(loaded, count), tau=chosen.tau)
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
            encodings=len({voice for row in voices for voice in row}),
            memory=self._built().denoiser.nbytes(),
        )
        return plan, voices

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
        key = tuple((item.report.name, item.report.sha256) for item in loaded)
        if self._engines is None or self._engines.key != key:
            made = Engines(key, self._engine(self.family.denoiser, loaded))
            for component in self.family.text_encoders:
                if any(component in item.file.parts for item in loaded):
                    made.text[component] = self._engine(component, loaded)
            self._engines = made
        return self._engines

    def _engine(self, component: str, loaded: Sequence[Loaded]) -> GatedAdapters:
        model = getattr(self.pipe, component)
        strong = "weight" if component == self.family.denoiser else "te_weight"
        parts = [
            Adapter(
                layers := item.file.parts.get(component, {}),
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
        prompt: str,
        negative: str | None,
        images: int,
        guided: bool,
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
                made[voice] = self.family.encode(self.pipe, prompt, negative, images, guided)
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

    def _reporter(
        self, run: Denoising, monitor: Monitor, total: int, preview_every: int, size: Mapping[str, int | None]
    ) -> Any:
        """diffusers' callback: move to the next step, report it, stop if asked."""

        def on_step_end(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            run.step = index + 1
            picture = None
            if preview_every and (index + 1) % preview_every == 0 and index + 1 < total:
                picture = preview(pipe, tensors["latents"], *self._pixels(size))
            monitor.report(Progress("sampling", index + 1, total, preview=picture))
            check(monitor)
            return {}

        return on_step_end

    def _pixels(self, size: Mapping[str, int | None]) -> tuple[int, int]:
        """Height and width of the pictures of a call."""
        own = getattr(self.pipe, "default_sample_size", None) or self._denoiser().config.sample_size
        own = own if isinstance(own, int) else own[0]
        default = own * self.pipe.vae_scale_factor
        return size["height"] or default, size["width"] or default

    def _memory_advice(self, plan: Plan) -> str:
        together = self._composition.adapter_batch or len(plan.adapters)
        if plan.method == "composite" and together > 1:
            return (
                f"Out of memory with {together} adapters denoised together: set adapter_batch=1, or memory='balanced'."
            )
        return "Out of memory: use memory='balanced' or 'low', fewer images at once, or a smaller size."

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


def _compute_dtype(model: Any, settings: Settings) -> torch.dtype:
    """The precision a model computes in (its weights may be stored in fewer bits)."""
    from pipelines.diffusion.loading import DTYPES

    stored: torch.dtype = model.dtype
    return stored if stored in DTYPES.values() else DTYPES[settings.dtype]


__all__ = ["Composition", "LoraReport", "MultiLoRAPipeline", "Output", "Plan", "Step"]
