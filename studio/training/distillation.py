"""The distillation job: the image trainer's loop with another target.

LoRA-Enhanced Distillation on Guided Diffusion Models (arXiv 2312.06899) and LCM-LoRA (arXiv 2311.05556): one frozen
base is the teacher (adapter off, guided, asked twice) and, with the adapter on, the student (asked once). The
mathematics stands in :mod:`pipelines.diffusion.distillation`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adapters.errors import InputError
from adapters.files import whole, write_text
from adapters.formats import read
from adapters.formats.fit import fit
from adapters.layers.gated import Adapter, GatedAdapters
from adapters.plugin import Handles, Outputs, Plugin, Plugins
from adapters.progress import Monitor, Progress
from pipelines.diffusion.checks import check_pristine
from pipelines.diffusion.distillation import embedding, trajectories
from pipelines.diffusion.distillation.consistency import pseudo_huber
from pipelines.diffusion.distillation.guidance import strength
from pipelines.diffusion.distillation.mark import Mark, config_hash
from pipelines.diffusion.distillation.student import Student
from pipelines.diffusion.families.base import latent_factor
from pipelines.diffusion.samplers import sampler
from pipelines.precision import choose_dtype
from studio import devices
from studio.datasets.cache import key_of
from studio.datasets.pictures import FolderReport
from studio.datasets.prompts import read_prompts
from studio.datasets.seeds import global_seed, uniform
from studio.training.base import load_base
from studio.training.device import make_accelerator
from studio.training.export import RECIPE_ENTRY, write_adapter
from studio.training.families import Tensors, family_of
from studio.training.forward import draw
from studio.training.image import SILENT, Training
from studio.training.inject import ADAPTER
from studio.training.objective import elementwise_loss, levels, per_sample
from studio.training.recorded import (
    Conditions,
    RecordedBatch,
    RecordedSupply,
    digest,
    prepare_folder,
    record,
)
from studio.training.records import check_tracker
from studio.training.samples import draw_samples
from studio.training.schemas.distill import DistillConfig
from studio.training.schemas.image import TrainImageConfig
from studio.training.supply import Batch, bucket_rule, read_folder
from studio.training.teacher import Teacher, path_of


def run(config: DistillConfig, folder: Path, monitor: Monitor = SILENT, resume: bool = False) -> dict[str, Any]:
    """Distil as ``config`` says, in ``folder``.

    Returns:
        As :func:`studio.training.image.run`, and ``distilled`` (the text entries of the file).

    Raises:
        InputError: something that cannot be distilled, in one sentence.
        Cancelled: stopped on request; a checkpoint to resume from was written.
    """
    folder = Path(folder)
    training = config.training()
    check_tracker(training.tracker)
    report = read_folder(training) if config.data.strip() else None  # before anything large is loaded
    listed = read_prompts(Path(config.prompts).expanduser()) if config.prompts.strip() else []
    monitor.report(Progress("loading", message=f"Loading the base model {config.base}"))
    device = devices.resolve(config.device)
    dtype = choose_dtype(config.dtype, torch.device(device))
    accelerator = make_accelerator(training, dtype, device, folder)
    family = family_of(load_base(training, dtype, accelerator.device))
    listening = monitor if accelerator.is_main_process else SILENT
    plugins = Plugins([GuidanceInput()] if config.guidance_mode == "embedding" else [])
    job = Distillation(
        training, folder, listening, accelerator, dtype, family, plugins, distillation=config, listed=listed
    )
    with global_seed(config.seed, "run", accelerator.process_index):
        try:
            job.prepare(report)  # type: ignore[arg-type]  # prompts may come without pictures
            job.restore(resume)
            return job.train()
        finally:
            job.close()


class GuidanceInput(Plugin):
    """Adds the projection that takes the guidance, before the optimiser is made."""

    name = "guidance-input"

    def initialise(self, handles: Handles) -> None:
        embedding.add_projection(handles.models["unet"])


@dataclass
class Distillation(Training):
    """One distillation: the image trainer's run whose batches are asked another question."""

    distillation: DistillConfig = field(kw_only=True)
    listed: Sequence[str] = field(kw_only=True, default=())

    @property
    def asked(self) -> DistillConfig:
        return self.distillation

    # ---------------------------------------------------------------- preparation
    def prepare_data(self, report: FolderReport | None) -> None:
        wanted, family = self.distillation, self.family
        self.path = path_of(family, wanted.knots) if self._needs_path else None
        self._attach_styles()
        self.teacher = Teacher(family, wanted, family.null_condition(wanted.null_prompt))
        if wanted.states == "data":
            assert report is not None
            super().prepare_data(report)
            self.prompts = list(wanted.sample_prompts) or self.prompts
        else:
            self._prepare_trajectories(report)

    @property
    def _needs_path(self) -> bool:
        return self.distillation.objective == "consistency" or self.distillation.states == "trajectories"

    def _check_model(self) -> None:
        super()._check_model()
        wanted, denoiser = self.distillation, self.family.denoiser
        check_pristine(self.family.pipe, (self.family.denoiser_name, *self.family.encoder_parts))
        taken = [key for key in ("guidance_embeds", "time_cond_proj_dim") if denoiser.config.get(key)]
        if taken and not wanted.force:
            raise InputError(
                f"The base '{wanted.base}' takes guidance as an input already ({taken[0]}), so it is distilled: choose "
                "its undistilled sibling, or set force if it really is guided by a second pass."
            )
        if wanted.guidance_mode == "embedding" and self.family.denoiser_name != "unet":
            raise InputError(
                f"Guidance as an embedding is for UNet models (SD, SDXL), not for {self.family.name}: choose "
                "guidance_mode 'fixed' or 'strength'."
            )

    def _attach_styles(self) -> None:
        """Let the styles act on the base: always, in the teacher as in the student."""
        self.attached = ExitStack()
        names = self.distillation.styles
        if not names:
            return
        from studio import library

        models = {self.family.denoiser_name: self.family.denoiser, **self.family.encoder_parts}
        chosen = [_named(text) for text in names]
        files = [
            fit(read(library.resolve_adapter(name)), models, self.distillation.base, tables=False) for name, _ in chosen
        ]
        for component, model in models.items():
            parts = [
                Adapter(file.parts.get(component, {}), strength=weight)
                for file, (_, weight) in zip(files, chosen, strict=True)
            ]
            if any(part.layers for part in parts):
                engine = GatedAdapters(model, parts, self.accelerator.device, model.dtype)
                self.attached.enter_context(engine.attached()).joint([1.0] * len(parts))

    def _prepare_trajectories(self, report: FolderReport | None) -> None:
        wanted, family, accelerator = self.distillation, self.family, self.accelerator
        self.rule = bucket_rule(self.config, family)
        size = self.rule.square
        captions = [picture.caption or "" for picture in report.pictures] if report else []
        prompts = list(self.listed) or captions
        factor = latent_factor(family.pipe)
        facts = trajectories.Facts(
            base=self.base_digest,
            prediction_type=self._prediction,
            knots=wanted.knots,
            shape=(int(family.pipe.vae.config.latent_channels), size[1] // factor, size[0] // factor),
            guidance=wanted.guidance_range,
            null_prompt=wanted.null_prompt,
            rescale=wanted.guidance_rescale,
            interval=(wanted.guidance_from, wanted.guidance_to),
            styles=tuple(self._style_digests()),
            prompts=key_of(*prompts),
            seed=wanted.seed,
        )
        place = Path(wanted.trajectories).expanduser() if wanted.trajectories.strip() else self.folder / "trajectories"
        conditions, count = Conditions(family, size), wanted.trajectory_count
        assert self.path is not None
        if accelerator.is_main_process:
            prepare_folder(place, facts, own=not wanted.trajectories.strip())
            record(
                place, facts, count, prompts, self.teacher, self.path, conditions, accelerator.device, self.dtype,
                accelerator.autocast, self.monitor,
            )  # fmt: skip
        accelerator.wait_for_everyone()
        recording = trajectories.read_recording(place, count)
        self.supply: Any = RecordedSupply(
            recording, conditions, wanted.batch_size, wanted.seed, accelerator.num_processes, accelerator.process_index
        )
        self.data_digest = digest(facts, count)
        self.total, self.validation = wanted.steps, []
        some = [prompts[0]] if wanted.sample_every else []
        self.prompts = list(wanted.sample_prompts) or some
        message = f"{count} trajectories of {len(set(recording.prompts))} prompts, {len(recording)} states"
        self.monitor.report(Progress("data", message=message))

    @property
    def _prediction(self) -> str:
        return str(getattr(self.family.process, "prediction", "flow_velocity"))

    def _style_digests(self) -> list[str]:
        from studio import library

        chosen = [_named(text) for text in self.distillation.styles]
        return [f"{library.sha256(library.resolve_adapter(name))[:16]}:{weight:g}" for name, weight in chosen]

    def _inject(self) -> None:
        super()._inject()
        self.student = Student(self.family.denoiser, ADAPTER)
        self.teacher.student = self.student

    # ---------------------------------------------------------------- the loop
    def train(self) -> dict[str, Any]:
        if self.step == 0:
            self._draw_teacher()
        return super().train()

    def optimiser_step(self, batches: Iterator[Any]) -> tuple[float, float, dict[str, float]]:
        try:
            return super().optimiser_step(batches)
        finally:
            self.student.set_strength(None)

    def forward(self, batch: Batch | RecordedBatch) -> tuple[torch.Tensor, Outputs]:
        """The loss of one batch: the student against the guided teacher, or against itself one knot further."""
        if isinstance(batch, RecordedBatch):
            state = self._recorded(batch)
        else:
            state = self._noised(batch)
        if self.distillation.objective == "consistency":
            return self._consistency(state)
        prediction = self._student(state.noisy, state.times, state.given, state.w)
        return self._loss(prediction, state.target, state.times)

    def _recorded(self, batch: RecordedBatch) -> _State:
        assert self.path is not None
        device = self.accelerator.device
        times = self.path.start()[batch.knots].to(device)
        given = {name: value.to(device) for name, value in batch.given.items()}
        return _State(batch.states.to(device), times, given, batch.guidance.to(device), batch.targets.to(device))

    def _noised(self, batch: Batch) -> _State:
        config, process, device = self.config, self.family.process, self.accelerator.device
        draws = draw(batch, config, config.seed)
        if self.distillation.objective == "consistency":
            assert self.path is not None
            knots = self.path.start()
            times = knots[(draws.u * len(knots)).long().clamp(max=len(knots) - 1)].to(device)
        else:
            u = levels(
                draws.u, sampling=process.default_sampling, mean=0.0, std=1.0, shift=process.default_shift,
                low=0.0, high=1.0,
            )  # fmt: skip
            times = process.times(u).to(device)
        clean = self.family.latents(batch.moments.to(device), draws.posterior.to(device))
        noisy = process.noisy(clean, draws.noise.to(device), times)
        given = {name: value.to(device) for name, value in batch.given.items()}
        low, high = self.distillation.guidance_range
        w = (low + (high - low) * uniform(config.seed, "guidance", batch.numbers)).to(device)
        with self.accelerator.autocast():
            target = self.teacher(noisy.to(self.dtype), times, given, w)
        return _State(noisy, times, given, w, target)

    def _student(self, noisy: torch.Tensor, times: torch.Tensor, given: Tensors, w: torch.Tensor) -> torch.Tensor:
        """The student's one pass, which knows w as the mode says."""
        mode = self.distillation.guidance_mode
        if mode == "strength":
            share = strength(w, self.distillation.guidance)
            assert isinstance(share, torch.Tensor)
            self.student.set_strength(share)
        elif mode == "embedding":
            given = given | {"guidance": embedding.sinusoid(w)}
        prediction: torch.Tensor = self.trainee(noisy.to(self.dtype), times, given)
        return prediction

    def _consistency(self, state: _State) -> tuple[torch.Tensor, Outputs]:
        """Both ends of one step of the teacher must lead the student to the same picture."""
        assert self.path is not None
        end = self.path.end(state.times)
        earlier = self.path.step(state.noisy, state.target, state.times, end)
        with torch.no_grad():
            there = self._student(earlier, end, state.given, state.w)
            target = self.path.jump(earlier, there.float(), end)
        here = self._student(state.noisy, state.times, state.given, state.w)
        return self._loss(self.path.jump(state.noisy, here.float(), state.times), target, state.times)

    def _loss(
        self, prediction: torch.Tensor, target: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, Outputs]:
        wanted = self.distillation
        if wanted.distance == "huber":
            losses = per_sample(pseudo_huber(prediction, target, wanted.huber_c))
        else:
            losses = per_sample(elementwise_loss(prediction, target, "l2", 1.0))
        return losses.mean(), Outputs(prediction, target, losses, times, len(losses))

    # ---------------------------------------------------------------- looking and saving
    @contextmanager
    def sampling(self) -> Iterator[TrainImageConfig]:
        """One conditional pass per step; few steps with their own sampler."""
        wanted, pipe = self.distillation, self.family.pipe
        values: dict[str, Any] = {"sample_guidance": 1.0}
        own = pipe.scheduler
        with ExitStack() as stack:
            if wanted.objective == "consistency":
                values["sample_steps"] = wanted.inference_steps
                pipe.scheduler = sampler("lcm", own, self.family.denoiser_name != "unet")
                stack.callback(setattr, pipe, "scheduler", own)
            if wanted.guidance_mode == "embedding":
                values["sample_guidance"] = wanted.guidance
                stack.enter_context(embedding.announced(self.family.denoiser))
            yield self.config.model_copy(update=values)

    def _draw_teacher(self) -> None:
        """The sample prompts as the teacher draws them (not for Flux, whose pipeline guides in another way)."""
        if not (self.accelerator.is_main_process and self.prompts) or self.family.name == "flux":
            return
        wanted = self.distillation
        config = self.config.model_copy(
            update={"sample_guidance": wanted.guidance, "sample_negative": wanted.null_prompt}
        )
        with self.student.off():
            pictures = draw_samples(self.family.pipe, self.prompts, self.rule.square, config, self.accelerator.device)
        for number, picture in enumerate(pictures):
            with whole(self.folder / "samples" / f"teacher-{number}.png") as part:
                picture.save(part, format="PNG")

    def mark(self) -> Mark:
        """What the file says of itself."""
        wanted = self.distillation
        few = wanted.objective == "consistency"
        return Mark(
            mode=wanted.guidance_mode,
            guidance=wanted.guidance,
            low=wanted.guidance_range[0],
            high=wanted.guidance_range[1],
            null_prompt=wanted.null_prompt,
            prediction_type=self._prediction,
            rescale=wanted.guidance_rescale,
            interval=(wanted.guidance_from, wanted.guidance_to),
            base=wanted.base,
            config_hash=config_hash(self.family.denoiser),
            objective=wanted.objective,
            steps=wanted.inference_steps if few else 0,
            sampler="lcm" if few else "",
        )

    def write(self, folder: Path, name: str, recipe: dict[str, Any]) -> dict[str, str]:
        entries = self.mark().to_metadata()
        paths: dict[str, str] = {}
        if self.distillation.guidance_mode == "embedding":
            with self._best_weights():
                weight = self.family.denoiser.time_embedding.cond_proj.weight.detach().cpu().float().clone()
            file = folder / f"{name}-{embedding.NAME}-{key_of(*weight.flatten().tolist())[:8]}.safetensors"
            entries["w_embedding"] = file.name
            paths["w-embedding"] = str(embedding.write(file, weight, {RECIPE_ENTRY: json.dumps(recipe), **entries}))
        paths |= write_adapter(self._final_layers(), folder, name, self.config, recipe, entries)
        write_text(folder / f"{name}.json", json.dumps({"description": str(self.mark()), **entries}, indent=1) + "\n")
        return paths

    def data_facts(self) -> dict[str, Any]:
        if self.distillation.states == "data":
            return super().data_facts()
        return {
            "trajectories": self.distillation.trajectory_count,
            "digest": self.data_digest,
            "example_prompt": self.supply.recording.prompts[0],
            "resolution": self.rule.resolution,
        }

    @property
    def _epoch(self) -> float:
        if self.distillation.states == "data":
            return super()._epoch
        return self.step * self.config.gradient_accumulation / float(self.supply.epoch_length)

    def _finish(self) -> dict[str, Any]:
        result = super()._finish()
        if result:
            teachers = sorted(str(file) for file in (self.folder / "samples").glob("teacher-*.png"))
            drawn = [file for file in result["samples"] if file not in teachers]
            result |= {"samples": drawn, "teacher_samples": teachers, "distilled": self.mark().to_metadata()}
        return result

    def write_card(self, recipe: dict[str, Any], samples: list[Path]) -> Path:
        """Write ``card.md``: what the adapter does, how to use it, how it was made."""
        return write_text(self.folder / "card.md", card_text(recipe, self.mark(), samples, self.folder))

    def close(self) -> None:
        super().close()
        if hasattr(self, "attached"):
            self.attached.close()


@dataclass(frozen=True)
class _State:
    """Where the student is asked: states, levels, conditioning, guidance and the teacher's answer."""

    noisy: torch.Tensor
    times: torch.Tensor
    given: Tensors
    w: torch.Tensor
    target: torch.Tensor


def card_text(recipe: dict[str, Any], mark: Mark, samples: Sequence[Path], folder: Path) -> str:
    """The card of a distilled adapter."""
    config, made = recipe["config"], recipe["training"]
    few = mark.objective == "consistency"
    what = f"pictures in {mark.steps} steps" if few else "guidance in one pass per step instead of two"
    use = {
        "fixed": f"guidance {mark.guidance:g} is built in: set the pipeline's guidance to 1",
        "strength": f"weight 1 is guidance {mark.guidance:g}, weight s is 1 + {mark.guidance - 1:g} s "
        f"(practised {mark.low:g} to {mark.high:g}); set the pipeline's guidance to 1",
        "embedding": f"guidance {mark.low:g} to {mark.high:g} as a setting, with the file '...-{embedding.NAME}-...' "
        "beside the LoRA",
    }[mark.mode]
    source = (
        f"{recipe['data']['trajectories']} recorded trajectories of the teacher"
        if "trajectories" in recipe["data"]
        else f"{recipe['data']['pictures']} pictures"
    )
    styles = ", ".join(f"`{name}`" for name in config["styles"])
    lines = [
        f"# {recipe['name']}",
        "",
        f"A distilled LoRA for **{recipe['base']['name']}** ({recipe['base']['family']}): {what}.",
        "",
        f"- Use: {use}" + (f", sampler `{mark.sampler}`, {mark.steps} steps" if few else ""),
        f"- A negative prompt has no effect any more; built in is `{mark.null_prompt}`",
        *([f"- Made on top of {styles}: use them together"] if styles else []),
        f"- Rank {config['rank']}, layers: {config['target_regex'] or config['targets']}",
        f"- {made['steps']} steps of {made['batch']} states from {source}, {config['optimizer']} at "
        f"{config['learning_rate']:g}, final loss {made['loss']:.5f}",
        f"- Digest of the base weights: `{recipe['base']['digest']}`",
        "",
        *[f"![sample]({path.relative_to(folder).as_posix()})" for path in samples],
        "",
        "Made with adapter-studio; the whole recipe is in the file's metadata "
        f"(`{RECIPE_ENTRY}`) and in `config.yaml`.",
        "",
    ]
    return "\n".join(lines)


def _named(text: str) -> tuple[str, float]:
    """(name, weight) of ``name`` or ``name:weight``."""
    match = re.fullmatch(r"(.+):([-+]?[\d.]+)", text.strip())
    return (match.group(1), float(match.group(2))) if match else (text.strip(), 1.0)
