"""Distillation: builds guidance, or sampling in few steps, into a LoRA on the same base.

LoRA-Enhanced Distillation on Guided Diffusion Models (arXiv 2312.06899) and LCM-LoRA (arXiv 2311.05556): one frozen
base is the teacher (adapter off, guided, two passes) and, with the adapter on, the student (one pass). The mathematics
is in :mod:`pipelines.diffusion.distillation`; base, pictures and files are the image task's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.errors import InputError
from adapters.files import whole, write_text
from adapters.formats import LoraFile
from adapters.plugin import Handles, Layers, Outputs, Plugin
from adapters.progress import Monitor, Progress
from pipelines.diffusion.checks import check_pristine
from pipelines.diffusion.distillation import embedding, trajectories
from pipelines.diffusion.distillation.consistency import pseudo_huber
from pipelines.diffusion.distillation.guidance import strength
from pipelines.diffusion.distillation.mark import Mark, config_hash
from pipelines.diffusion.distillation.student import Student
from pipelines.diffusion.samplers import sampler
from studio.datasets.cache import key_of
from studio.datasets.pictures import FolderReport
from studio.datasets.prompts import read_prompts
from studio.datasets.seeds import uniform
from studio.jobs.kinds import Kind
from studio.training.cards import base_name
from studio.training.device import main_process
from studio.training.drivers import accelerate as driver
from studio.training.export import RECIPE_ENTRY, image_front_matter, loading_lines, write_adapter
from studio.training.families import Family, Tensors
from studio.training.forward import draw
from studio.training.inject import ADAPTER
from studio.training.objective import elementwise_loss, levels, per_sample
from studio.training.ready import read_folder
from studio.training.recorded import (
    Conditions,
    RecordedBatch,
    RecordedSupply,
    digest,
    prepare_folder,
    record,
)
from studio.training.samples import draw_samples
from studio.training.schemas.distill import DistillConfig, style
from studio.training.schemas.image import TrainImageConfig
from studio.training.session import SILENT, TrainSession
from studio.training.supply import Batch, bucket_rule
from studio.training.task import Task
from studio.training.tasks.image import ImageTask
from studio.training.teacher import Teacher, path_of, styles_attached

KIND = Kind(
    "distill", "studio.training.schemas.distill:DistillConfig", "studio.training.tasks.distillation:run",
    continues=True, ready="studio.training.ready:distill",
    estimate="studio.training.estimate:look_at_distillation",
    afterwards="studio.library.adopt:trained", title="Distil", train="distill",
    help="Distil guidance (one pass per step instead of two) or few-step sampling into a LoRA.",
    example="studio train distill --prompts prompts.txt --guidance 4 --name guided",
)  # fmt: skip


def run(
    config: DistillConfig,
    folder: Path,
    monitor: Monitor = SILENT,
    resume: bool = False,
    plugins: Sequence[Plugin] = (),
    keep: bool | int = False,
) -> dict[str, Any]:
    """Distil ``config`` in ``folder``.

    Returns:
        As :func:`studio.training.tasks.image.run`, with ``distilled`` (the metadata of the file) and
        ``teacher_samples`` (paths).

    Raises:
        InputError: something that cannot be distilled, in one sentence.
        Cancelled: stopped on request; a checkpoint to resume from was written.
    """
    return driver.train(TrainSession.of(DistillationTask(config), folder, monitor, plugins), resume, keep)


class GuidanceInput(Plugin):
    """Adds the projection that takes the guidance, before the optimiser is made."""

    name = "guidance-input"

    def initialise(self, handles: Handles) -> None:
        embedding.add_projection(handles.models["unet"])


class DistillationTask(Task):
    """The same base with an adapter learns the teacher's guided predictions."""

    data_noun = "pictures, captions or prompts"
    leftovers = ImageTask.leftovers

    asked: DistillConfig
    config: TrainImageConfig

    def __init__(self, asked: DistillConfig) -> None:
        super().__init__(asked)
        self.config = asked.training()
        self.pictures = ImageTask(self.config)
        self.attached = ExitStack()

    # ---------------------------------------------------------------- before the first step
    def methods(self) -> list[Plugin]:
        return [GuidanceInput()] if self.asked.guidance_mode == "embedding" else []

    def rows(self) -> None:
        asked = self.asked
        self.report = read_folder(self.config) if asked.data.strip() else None
        self.listed = read_prompts(Path(asked.prompts).expanduser()) if asked.prompts.strip() else []

    def open(self, session: TrainSession) -> None:
        self.session = session
        self.pictures.open(session)

    def digest(self) -> str:
        return self.pictures.digest()

    def encode(self) -> None:
        wanted, pictures = self.asked, self.pictures
        self.path = path_of(pictures.family, wanted.knots) if self._needs_path else None
        device = self.session.accelerator.device
        self.attached.enter_context(styles_attached(wanted, pictures.family, device))
        self.teacher = Teacher(pictures.family, wanted, pictures.family.null_condition(wanted.null_prompt))
        if wanted.states == "data":
            assert self.report is not None
            pictures.report = self.report
            pictures.encode()
            pictures.prompts = list(wanted.sample_prompts) or pictures.prompts
            self.total, self.data_digest = pictures.total, pictures.data_digest
        else:
            self._prepare_trajectories(self.report)

    @property
    def family(self) -> Family:
        """The base's."""
        return self.pictures.family

    @property
    def _needs_path(self) -> bool:
        return self.asked.objective == "consistency" or self.asked.states == "trajectories"

    def check(self) -> None:
        self.pictures.check()
        wanted, denoiser = self.asked, self.family.denoiser
        check_pristine(self.family.pipe, (self.family.denoiser_name, *self.family.encoder_parts))
        taken = [key for key in ("guidance_embeds", "time_cond_proj_dim") if denoiser.config.get(key)]
        if taken and not wanted.force:
            raise InputError(
                f"The base '{wanted.base}' already takes guidance as an input ({taken[0]}), so it is distilled: choose "
                "its undistilled version, or set force if it is guided by a second pass after all."
            )
        if wanted.guidance_mode == "embedding" and self.family.denoiser_name != "unet":
            raise InputError(
                f"Guidance as an embedding is for UNet models (SD, SDXL), not for {self.family.name}: choose "
                "guidance_mode 'fixed' or 'strength'."
            )

    def _prepare_trajectories(self, report: FolderReport | None) -> None:
        wanted, family, accelerator = self.asked, self.family, self.session.accelerator
        self.pictures.rule = bucket_rule(self.config, family)
        size = self.pictures.rule.square
        captions = [picture.caption or "" for picture in report.pictures] if report else []
        prompts = list(self.listed) or captions
        factor = family.latent_factor
        facts = trajectories.Facts(
            base=self.session.base_digest,
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
        session, own = self.session, not wanted.trajectories.strip()
        place = session.folder / "trajectories" if own else Path(wanted.trajectories).expanduser()
        conditions, count = Conditions(family, size), wanted.trajectory_count
        assert self.path is not None
        if accelerator.is_main_process:
            prepare_folder(place, facts, own=own)
            record(
                place, facts, count, prompts, self.teacher, self.path, conditions, accelerator.device, session.dtype,
                accelerator.autocast, session.monitor,
            )  # fmt: skip
        accelerator.wait_for_everyone()
        recording = trajectories.read_recording(place, count)
        self.supply = self.pictures.supply = RecordedSupply(
            recording, conditions, wanted.batch_size, wanted.seed, accelerator.num_processes, accelerator.process_index
        )
        self.data_digest = digest(facts, count)
        self.total = self.pictures.total = wanted.steps
        some = [prompts[0]] if wanted.sample_every != 0 else []
        self.pictures.prompts = list(wanted.sample_prompts) or some
        message = f"{count} trajectories of {len(set(recording.prompts))} prompts, {len(recording)} states"
        self.session.monitor.report(Progress("data", message=message))
        self.pictures.rest()

    @property
    def _prediction(self) -> str:
        return str(getattr(self.family.process, "prediction", "flow_velocity"))

    def _style_digests(self) -> list[str]:
        from studio import library

        chosen = [style(text) for text in self.asked.styles]
        return [f"{library.sha256(library.resolve_adapter(name))[:16]}:{weight:g}" for name, weight in chosen]

    def components(self) -> dict[str, Any]:
        return self.pictures.components()

    def earlier(self, models: Mapping[str, Any]) -> LoraFile | None:
        return self.pictures.earlier(models)

    def inject(self, models: dict[str, Any]) -> dict[str, Any]:
        return self.pictures.inject(models)

    def trainee(self) -> nn.Module:
        self.student = Student(self.family.denoiser, ADAPTER)
        self.teacher.student = self.student
        return self.pictures.trainee()

    # ---------------------------------------------------------------- steps
    def collate(self, start: int, stop: int) -> Iterator[Any]:
        return self.pictures.collate(start, stop)

    def rose(self, first: float, last: float) -> bool:
        return False  # an untrained student equals its teacher, so its loss starts near zero and rises

    def after_step(self) -> None:
        self.student.set_strength(None)

    def loss(self, batch: Batch | RecordedBatch) -> tuple[torch.Tensor, Outputs]:
        """The loss of one batch: the student against the guided teacher, or against itself one knot further."""
        if isinstance(batch, RecordedBatch):
            state = self._recorded(batch)
        else:
            state = self._noised(batch)
        if self.asked.objective == "consistency":
            return self._consistency(state)
        prediction = self._ask(state.noisy, state.times, state.given, state.w)
        return self._loss(prediction, state.target, state.times)

    def _recorded(self, batch: RecordedBatch) -> _State:
        assert self.path is not None
        device = self.session.accelerator.device
        times = self.path.start()[batch.knots].to(device)
        given = {name: value.to(device) for name, value in batch.given.items()}
        return _State(batch.states.to(device), times, given, batch.guidance.to(device), batch.targets.to(device))

    def _noised(self, batch: Batch) -> _State:
        config, process, device = self.config, self.family.process, self.session.accelerator.device
        draws = draw(batch, config, config.seed)
        if self.asked.objective == "consistency":
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
        low, high = self.asked.guidance_range
        w = (low + (high - low) * uniform(config.seed, "guidance", batch.numbers)).to(device)
        with self.session.accelerator.autocast():
            target = self.teacher(noisy.to(self.session.dtype), times, given, w)
        return _State(noisy, times, given, w, target)

    def _ask(self, noisy: torch.Tensor, times: torch.Tensor, given: Tensors, w: torch.Tensor) -> torch.Tensor:
        """The student's one pass, with w given as the mode requires."""
        mode = self.asked.guidance_mode
        if mode == "strength":
            share = strength(w, self.asked.guidance)
            assert isinstance(share, torch.Tensor)
            self.student.set_strength(share)
        elif mode == "embedding":
            given = given | {"guidance": embedding.sinusoid(w)}
        prediction: torch.Tensor = self.learner(noisy.to(self.session.dtype), times, given)
        return prediction

    def _consistency(self, state: _State) -> tuple[torch.Tensor, Outputs]:
        """Both ends of one step of the teacher must lead the student to the same picture."""
        assert self.path is not None
        end = self.path.end(state.times)
        earlier = self.path.step(state.noisy, state.target, state.times, end)
        with torch.no_grad():
            there = self._ask(earlier, end, state.given, state.w)
            target = self.path.jump(earlier, there.float(), end)
        here = self._ask(state.noisy, state.times, state.given, state.w)
        return self._loss(self.path.jump(state.noisy, here.float(), state.times), target, state.times)

    def _loss(
        self, prediction: torch.Tensor, target: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, Outputs]:
        wanted = self.asked
        if wanted.distance == "huber":
            losses = per_sample(pseudo_huber(prediction, target, wanted.huber_c))
        else:
            losses = per_sample(elementwise_loss(prediction, target, "l2", 1.0))
        return losses.mean(), Outputs(prediction, target, losses, times, len(losses))

    def epoch(self, step: int) -> float:
        if self.asked.states == "data":
            return self.pictures.epoch(step)
        return step * self.config.gradient_accumulation / float(self.supply.epoch_length)

    # ---------------------------------------------------------------- looking and saving
    @property
    def samples_wanted(self) -> bool:
        return self.pictures.samples_wanted

    def sample(self, step: int) -> None:
        """One conditional pass per step; few steps with their own sampler."""
        wanted, pipe = self.asked, self.family.pipe
        values: dict[str, Any] = {"sample_guidance": self._scale(1.0)}
        own = pipe.scheduler
        with ExitStack() as stack:
            if wanted.objective == "consistency":
                values["sample_steps"] = wanted.inference_steps
                pipe.scheduler = sampler("lcm", own, self.family.denoiser_name != "unet")
                stack.callback(setattr, pipe, "scheduler", own)
            if wanted.guidance_mode == "embedding":
                values["sample_guidance"] = self._scale(wanted.guidance)
                stack.enter_context(embedding.announced(self.family.denoiser))
            self.pictures.draw(step, self.config.model_copy(update=values))

    def before_first(self) -> None:
        """The sample prompts as the teacher draws them (not for Flux, whose pipeline guides in another way)."""
        if not (main_process() and self.pictures.prompts) or self.family.name == "flux":
            return
        wanted = self.asked
        config = self.config.model_copy(
            update={"sample_guidance": self._scale(wanted.guidance), "sample_negative": wanted.null_prompt}
        )
        with self.student.off():
            pictures = draw_samples(
                self.family.pipe,
                self.pictures.prompts,
                self.pictures.rule.square,
                config,
                self.session.accelerator.device,
            )
        for number, picture in enumerate(pictures):
            with whole(self.session.folder / "samples" / f"teacher-{number}.png") as part:
                picture.save(part, format="PNG")

    def _scale(self, guidance: float) -> float:
        """guidance_scale of the base's pipeline for a guidance where 1 is none."""
        return guidance - 1 + self.family.about.no_guidance

    def mark(self) -> Mark:
        """The file's metadata on the distillation."""
        wanted = self.asked
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

    def export(self, layers: Layers, folder: Path, name: str, recipe: dict[str, Any]) -> dict[str, str]:
        entries = self.mark().to_metadata()
        paths: dict[str, str] = {}
        if self.asked.guidance_mode == "embedding":
            with self.session.best_weights():
                weight = self.family.denoiser.time_embedding.cond_proj.weight.detach().cpu().float().clone()
            file = folder / f"{name}-{embedding.NAME}-{key_of(*weight.flatten().tolist())[:8]}.safetensors"
            entries["w_embedding"] = file.name
            paths["w-embedding"] = str(embedding.write(file, weight, {RECIPE_ENTRY: json.dumps(recipe), **entries}))
        paths = write_adapter(layers, folder, name, self.config, recipe, entries) | paths
        write_text(folder / f"{name}.json", json.dumps({"description": str(self.mark()), **entries}, indent=1) + "\n")
        return paths

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.asked.states == "data":
            return self.pictures.facts()
        data = {
            "trajectories": self.asked.trajectory_count,
            "digest": self.data_digest,
            "example_prompt": self.supply.recording.prompts[0],
            "resolution": self.pictures.rule.resolution,
        }
        return {"family": self.family.name}, data

    def card(self, recipe: dict[str, Any]) -> Path:
        samples = self.pictures.latest_samples()
        return write_text(self.session.folder / "card.md", card_text(recipe, self.mark(), samples, self.session.folder))

    def result(self, paths: Mapping[str, str]) -> dict[str, Any]:
        found = self.pictures.result(paths)
        teachers = sorted(str(file) for file in (self.session.folder / "samples").glob("teacher-*.png"))
        return found | {"teacher_samples": teachers, "distilled": self.mark().to_metadata()}

    def close(self) -> None:
        self.attached.close()


@dataclass(frozen=True)
class _State:
    """The student's inputs (states, levels, conditioning, guidance) and the teacher's prediction."""

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
        f"(trained from {mark.low:g} to {mark.high:g}); set the pipeline's guidance to 1",
        "embedding": f"guidance {mark.low:g} to {mark.high:g} as a setting, with the file '...-{embedding.NAME}-...' "
        "beside the LoRA",
    }[mark.mode]
    source = (
        f"{recipe['data']['trajectories']} recorded trajectories of the teacher"
        if "trajectories" in recipe["data"]
        else f"{recipe['data']['pictures']} pictures"
    )
    styles = ", ".join(f"`{name}`" for name in config["styles"])
    base = str(recipe["base"]["name"])
    scheduler = "FlowMatchLCMScheduler" if mark.prediction_type == "flow_velocity" else "LCMScheduler"
    loaded = [] if mark.mode == "embedding" else loading_lines(  # which diffusers has no input for
        base, f"{recipe['name']}.safetensors", str(recipe["data"]["example_prompt"]), config["resolution"],
        mark.steps or 20, 1.0, scheduler if few else "",
    )  # fmt: skip
    lines = [
        *image_front_matter(recipe),
        f"# {recipe['name']}",
        "",
        f"A distilled LoRA for **{base_name(base)}** ({recipe['base']['family']}): {what}.",
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
        *[*loaded, *([""] if loaded else [])],
        "Made with adapter-studio; the whole recipe is in the file's metadata "
        f"(`{RECIPE_ENTRY}`) and in `config.yaml`.",
        "",
    ]
    return "\n".join(lines)
