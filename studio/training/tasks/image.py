"""Training from pictures: a LoRA of a text-to-image model of any family."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.errors import InputError
from adapters.formats import LoraFile, read
from adapters.formats.fit import fit
from adapters.layers.variant import untouched
from adapters.plugin import Layers, Outputs, Plugin
from adapters.progress import Monitor, Progress
from studio import settings
from studio.composition import base_settings
from studio.datasets.cache import fingerprint
from studio.datasets.pictures import FolderReport, usable_pictures
from studio.datasets.plan import PictureSet, Plan
from studio.jobs.kinds import Kind
from studio.training.base import load_base
from studio.training.drivers import accelerate as driver
from studio.training.export import write_adapter, write_card
from studio.training.families import Family, family_of
from studio.training.forward import draw, training_loss, validation_loss
from studio.training.inject import inject, lora_config
from studio.training.prior import class_folder, draw_class_pictures
from studio.training.ready import check_family, read_folder
from studio.training.samples import Pair, draw_samples, sample_prompts, save_samples
from studio.training.schemas.image import TrainImageConfig
from studio.training.session import SILENT, Keep, TrainSession
from studio.training.supply import (
    Batch,
    Supply,
    augmentation,
    bucket_rule,
    class_set,
    cut_away,
    picture_set,
    split,
    validation_picks,
)
from studio.training.task import Measures, Task
from studio.training.trainee import Trainee

KIND = Kind(
    "train-image", "studio.training.schemas.image:TrainImageConfig", "studio.training.tasks.image:run",
    continues=True, federated=True, ready="studio.training.ready:image", estimate="studio.training.estimate:look",
    afterwards="studio.library.adopt:trained", title="Train", train="image",
    help="Train a LoRA of a text-to-image model from a folder of pictures.",
    example="studio train image --data photos/ --preset concept --trigger zxq --name my-thing",
)  # fmt: skip


def run(
    config: TrainImageConfig,
    folder: Path,
    monitor: Monitor = SILENT,
    resume: bool = False,
    plugins: Sequence[Plugin] = (),
    keep: Keep = False,
) -> dict[str, Any]:
    """Train the adapter that ``config`` describes in ``folder``.

    Args:
        folder: gets ``NAME.safetensors``, ``card.md``, ``config.yaml``, ``loss.csv``, ``samples/``, ``checkpoints/``.
        resume: go on from the newest checkpoint in ``folder`` (from the beginning if there is none).
        plugins: training methods that join those of the configuration.
        keep: do not train: save the newest checkpoint, a given step's, or the start, as the adapter.

    Returns:
        ``adapter`` (path), ``exports`` (format -> path), ``card``, ``loss`` (mean of the last tenth), ``steps``,
        ``samples`` (paths), ``pairs`` (of a ``prompt`` and ``seed`` the pictures ``without`` and ``with_`` the
        adapter), ``seconds``, ``steps_per_second``, ``parameters``, ``triggers``.

    Raises:
        InputError: something that cannot be trained, in one sentence.
        Cancelled: stopped on request; a checkpoint to resume from was written.
    """
    return driver.train(TrainSession.of(ImageTask(config), folder, monitor, plugins), resume, keep)


class ImageTask(Task):
    """A folder of pictures, noise on their latents, and a denoiser that learns to remove it."""

    data_noun = "pictures or captions"
    leftovers = ("checkpoints", "samples", "saved")

    config: TrainImageConfig
    family: Family
    supply: Any
    prompts: list[str]
    validation: list[Batch]

    # ---------------------------------------------------------------- before the first step
    def rows(self) -> None:
        self.report = read_folder(self.config)

    def open(self, session: TrainSession) -> None:
        self.session = session
        self.family = family_of(load_base(self.config, session.dtype, session.device))

    def check(self) -> None:
        config, family = self.config, self.family
        check_family(config, family.name)
        if config.snr_gamma is not None:
            family.process.check_min_snr()
        family.guidance = config.guidance

    def digest(self) -> str:
        return fingerprint(self.family.denoiser)

    def encode(self) -> None:
        config, family = self.config, self.family
        self.rule = bucket_rule(config, family)
        self.data_digest = self.report.digest()
        everything = picture_set(self.report, self.rule, config)
        shown, held_out = split(everything, config.validation_split, config.seed)
        self.plan = Plan(
            shown,
            self._class_pictures(),
            batch_size=config.batch_size,
            repeats=config.repeats,
            augmentation=augmentation(config),
            seed=config.seed,
            processes=self.session.accelerator.num_processes,
            rank=self.session.accelerator.process_index,
        )
        self.total = config.steps
        if config.epochs:
            self.total = math.ceil(config.epochs * self.plan.epoch_length / config.gradient_accumulation)
        self.supply = Supply(family, self.plan, config, self._cache_folder)
        picks = validation_picks(held_out) if held_out else []
        self.supply.warm(self.session.monitor, picks)
        self.validation = [self.supply.assemble([pick], 1) for pick in picks]
        self.prompts = sample_prompts(config, shown.captions)
        self.session.monitor.report(Progress("data", message=self._summary(self.report, shown)))
        self.rest()

    def _summary(self, report: FolderReport, shown: PictureSet) -> str:
        sizes = ", ".join(f"{w} x {h}" for w, h in sorted(set(shown.buckets)))
        parts = [f"{len(shown)} pictures, {len(set(shown.captions))} different captions, sizes {sizes}"]
        if report.broken:
            parts.append(f"left out: {', '.join(sorted(report.broken))}")
        remarks = [*report.remarks, *cut_away(shown)]
        parts += [*remarks[:20], *([f"and {len(remarks) - 20} more remarks"] if len(remarks) > 20 else [])]
        long = self.family.cut_short(sorted(set(shown.captions)))
        if long:
            parts.append(f"{len(long)} captions are longer than the text encoder reads, e.g. '{long[0][:60]}...'")
        return "; ".join(parts)

    def _class_pictures(self) -> PictureSet | None:
        config = self.config
        if not config.prior_preservation:
            return None
        place = Path(config.class_data).expanduser()
        if not config.class_data:
            size, pipe = self.rule.square, self.family.pipe
            usual = base_settings.of_pipeline(config.base, pipe)
            place = class_folder(self._cache_folder, self.session.base_digest, config.class_prompt, size, usual)
            if self.session.accelerator.is_main_process:
                files = draw_class_pictures(
                    pipe, place, config.class_prompt, config.class_images, size, usual, self.session.monitor
                )
            self.session.accelerator.wait_for_everyone()
        report = usable_pictures(place, skip_broken=config.skip_broken)
        if not config.class_data:
            report.pictures = report.pictures[: config.class_images]
            assert not self.session.accelerator.is_main_process or len(files) == len(report.pictures)
        return class_set(report, self.rule, config.class_prompt)

    @property
    def _cache_folder(self) -> Path:
        return Path(self.config.cache_folder).expanduser() if self.config.cache_folder else settings.folder("cache")

    def rest(self) -> None:
        """Move parts whose output is cached off the accelerator, if the memory preset says so."""
        if self.config.memory == "none":
            return
        if not self.supply.needs_vae:
            self.family.pipe.vae.to("cpu")
        if not self.supply.needs_text_encoders:
            for part in self.family.encoder_parts.values():
                part.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def components(self) -> dict[str, Any]:
        self.encoders = self.family.text_encoders if self.config.train_text_encoder else {}
        return {self.family.denoiser_name: self.family.denoiser, **self.encoders}

    def earlier(self, models: Mapping[str, Any]) -> LoraFile | None:
        if not self.config.continue_from:
            return None
        from studio import library

        file = read(library.resolve_adapter(self.config.continue_from))
        if any(component.startswith("text_encoder") and component not in models for component in file.parts):
            raise InputError("The adapter to continue from also adapts text encoders: set train_text_encoder to true.")
        return fit(file, dict(models), self.config.base, tables=False)

    def inject(self, models: dict[str, Any]) -> dict[str, Any]:
        config, patterns = self.config, self.family.about.targets
        made = {name: lora_config(model, config, name in self.encoders, patterns) for name, model in models.items()}
        for name, model in models.items():
            inject(model, made[name])
        self.learner = Trainee(self.family, self.encoders)
        return models

    def trainee(self) -> nn.Module:
        config, denoiser = self.config, self.family.denoiser
        if config.gradient_checkpointing or config.memory == "low":
            denoiser.enable_gradient_checkpointing()
            for encoder in self.encoders.values():
                encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.compile:
            denoiser.compile()
        learner: nn.Module = self.learner
        return learner

    # ---------------------------------------------------------------- steps
    def collate(self, start: int, stop: int) -> Iterator[Batch]:
        batches: Iterator[Batch] = self.supply.stream(start, stop)
        return batches

    def loss(self, batch: Batch) -> tuple[torch.Tensor, Outputs]:
        config, session = self.config, self.session
        draws = draw(batch, config, config.seed)
        return training_loss(self.learner, self.family, batch, draws, config, session.device, session.dtype)

    @property
    def measurable(self) -> bool:
        return bool(self.validation)

    def measure(self) -> Measures:
        session = self.session
        self.learner.eval()
        try:
            found = validation_loss(
                self.learner, self.family, self.validation, self.config, session.device, session.dtype
            )
        finally:
            self.learner.train()
        return {"validation_loss": found}

    def epoch(self, step: int) -> float:
        return step * self.config.gradient_accumulation / self.plan.epoch_length

    # ---------------------------------------------------------------- looking and saving
    @property
    def samples_wanted(self) -> bool:
        return bool(self.prompts)

    def sample(self, step: int) -> None:
        self.draw(step, self.config)

    def draw(self, step: int, config: TrainImageConfig) -> None:
        """Draw the prompts as ``config`` says; write and report the pictures."""
        for file in self._drawn(config, f"step-{step:06d}"):
            self.session.monitor.report(Progress("sampling", step, self.total, preview=str(file)))

    def sample_without(self) -> None:
        with ExitStack() as stack:
            for model in self.session.models.values():
                stack.enter_context(untouched(model))
            self._drawn(self.config, "without")

    def _drawn(self, config: TrainImageConfig, name: str) -> list[Path]:
        session = self.session
        pictures = draw_samples(self.family.pipe, self.prompts, self.rule.square, config, session.device)
        return save_samples(pictures, session.folder / "samples", name)

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        shown = self.plan.shown
        data = {
            "pictures": len(shown),
            "digest": self.data_digest,
            "example_prompt": shown.captions[0],
            "resolution": self.rule.resolution,
        }
        return {"family": self.family.name}, data

    def export(self, layers: Layers, folder: Path, name: str, recipe: dict[str, Any]) -> dict[str, str]:
        return write_adapter(layers, folder, name, self.config, recipe)

    def samples(self) -> list[Path]:
        """All sample pictures of the run."""
        return sorted((self.session.folder / "samples").glob("step-*.png"))

    def latest_samples(self) -> list[Path]:
        """Those of the last step."""
        return [file for file in self.samples() if file.name.startswith(f"step-{self.session.step:06d}-")]

    def pairs(self) -> list[Pair]:
        """The sample prompts drawn without and with the finished adapter, everything else the same."""
        drawn = zip(self.prompts, sorted((self.session.folder / "samples").glob("without-*.png")),
                    self.latest_samples(), strict=False)  # fmt: skip
        return [Pair(prompt, self.config.sample_seed + number, str(without), str(with_))
                for number, (prompt, without, with_) in enumerate(drawn)]  # fmt: skip

    def card(self, recipe: dict[str, Any]) -> Path:
        return write_card(self.session.folder, recipe, self.latest_samples(), self.pairs())

    def result(self, paths: Mapping[str, str]) -> dict[str, Any]:
        samples = [str(file) for file in self.samples()]
        return {"exports": dict(paths), "samples": samples, "pairs": [pair._asdict() for pair in self.pairs()]}
