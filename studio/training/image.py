"""The image training job: an accelerate loop over diffusion models of every family.

Order of one optimiser step: for each forward pass noise, prediction, loss, backward; then gradients of all processes
are in place, plugins see them, they are clipped, the optimiser steps, the average follows, and every so often the run
samples, validates, saves and writes a checkpoint. Only the main process writes.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.errors import Cancelled, InputError
from adapters.files import whole
from adapters.formats import LoraFile, read
from adapters.formats.fit import fit
from adapters.plugin import Calibration, Closure, Handles, Layers, Outputs, Plugin, Plugins
from adapters.progress import Monitor, Progress, Silent
from pipelines.precision import choose_dtype
from studio import devices, settings
from studio.datasets.cache import fingerprint
from studio.datasets.pictures import FolderReport, usable_pictures
from studio.datasets.plan import PictureSet, Plan
from studio.datasets.seeds import global_seed
from studio.schema import JobConfig
from studio.training import checkpoint as checkpoints
from studio.training.base import load_base
from studio.training.checkpoint import Checkpoint
from studio.training.device import make_accelerator
from studio.training.export import (
    check_exports,
    make_recipe,
    write_adapter,
    write_card,
)
from studio.training.families import Family, family_of
from studio.training.forward import draw, training_loss, validation_loss
from studio.training.inject import inject, lora_config, lora_layers, start_from, trainable
from studio.training.methods import plugins_for
from studio.training.optimizers import averaged, lr_factor, make_optimizer, parameter_groups, running_average
from studio.training.prior import class_folder, draw_class_pictures
from studio.training.records import LossCurve, check_tracker, due, recent
from studio.training.samples import draw_samples, sample_prompts, save_samples
from studio.training.schemas.image import TrainImageConfig
from studio.training.supply import (
    Batch,
    Supply,
    augmentation,
    bucket_rule,
    class_set,
    cut_away,
    picture_set,
    read_folder,
    split,
    validation_picks,
)
from studio.training.trainee import Trainee

SILENT = Silent()


def run(
    config: TrainImageConfig,
    folder: Path,
    monitor: Monitor = SILENT,
    resume: bool = False,
    plugins: Sequence[Plugin] = (),
) -> dict[str, Any]:
    """Train the adapter that ``config`` describes in ``folder``.

    Args:
        folder: gets ``NAME.safetensors``, ``card.md``, ``config.yaml``, ``loss.csv``, ``samples/``, ``checkpoints/``.
        resume: go on from the newest checkpoint in ``folder`` (from the beginning if there is none).
        plugins: training methods that join the loop.

    Returns:
        ``adapter`` (path), ``exports`` (format -> path), ``card``, ``loss`` (mean of the last tenth), ``steps``,
        ``samples`` (paths), ``seconds``, ``steps_per_second``, ``parameters``, ``triggers``.

    Raises:
        InputError: something that cannot be trained, in one sentence.
        Cancelled: stopped on request; a checkpoint to resume from was written.
    """
    folder = Path(folder)
    check_tracker(config.tracker)
    report = read_folder(config)  # before anything large is loaded
    monitor.report(Progress("loading", message=f"Loading the base model {config.base}"))
    device = devices.resolve(config.device)
    dtype = choose_dtype(config.dtype, torch.device(device))
    accelerator = make_accelerator(config, dtype, device, folder)
    family = family_of(load_base(config, dtype, accelerator.device))
    listening = monitor if accelerator.is_main_process else SILENT
    together = Plugins([*plugins_for(config), *plugins])
    training = Training(config, folder, listening, accelerator, dtype, family, together)
    training.resuming = resume and bool(checkpoints.existing(folder / "checkpoints"))
    with global_seed(config.seed, "run", accelerator.process_index):
        try:
            training.prepare(report)
            training.restore(resume)
            return training.train()
        finally:
            training.close()


@dataclass
class Training:
    """One run: what is loaded, how far it is."""

    config: TrainImageConfig
    folder: Path
    monitor: Monitor
    accelerator: Any
    dtype: torch.dtype
    family: Family
    plugins: Plugins

    resuming: bool = False
    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def asked(self) -> JobConfig:
        """The configuration as the person gave it: what is recorded, and compared when a run is resumed."""
        return self.config

    # ---------------------------------------------------------------- preparation
    def prepare(self, report: FolderReport) -> None:
        """Data, adapters and optimiser."""
        self.plugins.configure(self.config)
        self._check_model()
        torch.backends.cuda.matmul.allow_tf32 = self.config.tf32
        self.base_digest = fingerprint(self.family.denoiser)
        self.prepare_data(report)
        self._rest()
        self._inject()

    def prepare_data(self, report: FolderReport) -> None:
        """What the batches consist of, encoded as far as it is kept."""
        config, family = self.config, self.family
        self.rule = bucket_rule(config, family)
        self.data_digest = report.digest()
        everything = picture_set(report, self.rule, config)
        shown, held_out = split(everything, config.validation_split, config.seed)
        self.plan = Plan(
            shown,
            self._class_pictures(),
            batch_size=config.batch_size,
            repeats=config.repeats,
            augmentation=augmentation(config),
            seed=config.seed,
            processes=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
        )
        self.total = config.steps
        if config.epochs:
            self.total = math.ceil(config.epochs * self.plan.epoch_length / config.gradient_accumulation)
        self.supply = Supply(family, self.plan, config, self._cache_folder)
        picks = validation_picks(held_out) if held_out else []
        self.supply.warm(self.monitor, picks)
        self.validation = [self.supply.assemble([pick], 1) for pick in picks]
        self.prompts = sample_prompts(config, shown.captions)
        self.monitor.report(Progress("data", message=self._data_summary(report, shown)))

    def _data_summary(self, report: FolderReport, shown: PictureSet) -> str:
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

    def _check_model(self) -> None:
        config, family = self.config, self.family
        check_exports(config, family.denoiser_name)
        if config.train_text_encoder and not family.text_encoder_names:
            raise InputError(f"Text encoder LoRAs of {family.name} are not trained: set train_text_encoder to false.")
        if config.snr_gamma is not None:
            family.process.check_min_snr()
        family.guidance = config.guidance

    def _class_pictures(self) -> PictureSet | None:
        config = self.config
        if not config.prior_preservation:
            return None
        place = Path(config.class_data).expanduser()
        if not config.class_data:
            size = self.rule.square
            place = class_folder(self._cache_folder, self.base_digest, config.class_prompt, size)
            if self.accelerator.is_main_process:
                pipe = self.family.pipe
                files = draw_class_pictures(pipe, place, config.class_prompt, config.class_images, size, self.monitor)
            self.accelerator.wait_for_everyone()
        report = usable_pictures(place, skip_broken=config.skip_broken)
        if not config.class_data:
            report.pictures = report.pictures[: config.class_images]
            assert not self.accelerator.is_main_process or len(files) == len(report.pictures)
        return class_set(report, self.rule, config.class_prompt)

    @property
    def _cache_folder(self) -> Path:
        return Path(self.config.cache_folder).expanduser() if self.config.cache_folder else settings.folder("cache")

    def _rest(self) -> None:
        """Move parts whose output is cached off the accelerator, if memory is to be saved."""
        if self.config.memory == "none":
            return
        if not self.supply.needs_vae:
            self.family.pipe.vae.to("cpu")
        if not self.supply.needs_text_encoders:
            for part in self.family.encoder_parts.values():
                part.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _inject(self) -> None:
        config, family = self.config, self.family
        encoders = family.text_encoders if config.train_text_encoder else {}
        models: dict[str, Any] = {family.denoiser_name: family.denoiser, **encoders}
        self.plugins.before_inject(models)
        patterns = family.about.targets
        made = {name: lora_config(model, config, name in encoders, patterns) for name, model in models.items()}
        earlier = self._earlier_adapter(models)
        with global_seed(config.seed, "init"):
            for name, model in models.items():
                inject(model, made[name])
        if earlier is not None:
            start_from(models, earlier)
        self.models = models
        self.trainee: Any = Trainee(family, encoders)
        self.plugins.initialise(self._handles(calibration=self._calibration()))
        if config.gradient_checkpointing or config.memory == "low":
            family.denoiser.enable_gradient_checkpointing()
            for encoder in encoders.values():
                encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.parameters = [parameter for model in models.values() for parameter in trainable(model)]
        self.text_parameters = [p for model in encoders.values() for p in trainable(model)]
        groups = parameter_groups(models, family.denoiser_name, config)
        optimizer = make_optimizer(groups, config)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        if config.compile:
            family.denoiser.compile()
        self.trainee, self.optimizer = self.accelerator.prepare(self.trainee, optimizer)
        self.plugins.after_inject(self._handles(optimizer=self.optimizer.optimizer))
        self.ema = running_average(self.parameters, config)
        self.trainee.train()

    def _handles(self, **more: Any) -> Handles:
        return Handles(self.models, steps=self.total, seed=self.config.seed, **more)

    def _calibration(self) -> Calibration | None:
        """A look at the first batches, if a plugin needs one; a run that is taken up has had it."""
        if "calibration" not in self.plugins.needs() or self.resuming:
            return None

        def losses(count: int) -> Iterator[Closure]:
            for batch in self.supply.stream(0, count):
                yield partial(self._calibrating_loss, batch)

        return Calibration(losses, self.config.learning_rate * lr_factor(0, self.total, self.config))

    def _calibrating_loss(self, batch: Any) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.forward(batch)[0]

    def _earlier_adapter(self, models: dict[str, Any]) -> LoraFile | None:
        """The adapter to continue from, laid onto the models as they are before the injection."""
        if not self.config.continue_from:
            return None
        from studio import library

        file = read(library.resolve_adapter(self.config.continue_from))
        if any(component.startswith("text_encoder") and component not in models for component in file.parts):
            raise InputError("The adapter to continue from also adapts text encoders: set train_text_encoder to true.")
        return fit(file, models, self.config.base, tables=False)

    # ---------------------------------------------------------------- start and resume
    def restore(self, resume: bool) -> None:
        """Take up the newest checkpoint, or clear what an earlier run left behind."""
        found = checkpoints.existing(self.folder / "checkpoints")
        if resume and found:
            self._load(checkpoints.load(found[-1]))
        if not self.accelerator.is_main_process:
            return
        if self.step == 0:
            for old in ("checkpoints", "samples", "saved"):
                shutil.rmtree(self.folder / old, ignore_errors=True)
        with whole(self.folder / "config.yaml") as part:
            part.write_text(self.asked.to_yaml(), encoding="utf-8")
        self.curve = LossCurve(self.folder / "loss.csv", self.step)
        if self.config.tracker != "none":
            self.accelerator.init_trackers(self.config.name)

    def _load(self, saved: Checkpoint) -> None:
        checkpoints.check_same_run(saved, self.asked, self.data_digest, "pictures or captions")
        with torch.no_grad():
            for name, parameter in self._named_parameters():
                parameter.copy_(saved.adapter[name])
        self.optimizer.load_state_dict(saved.optimizer)
        if self.ema is not None and saved.ema is not None:
            self.ema.load_state_dict(saved.ema)
            self.ema.to(self.accelerator.device)
        if self.accelerator.scaler is not None and saved.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.scaler)
        self.plugins.load_state_dict(saved.plugins)
        self.step, self.losses, self.seconds = saved.step, saved.losses, saved.seconds

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for component, model in self.models.items():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    yield f"{component}.{name}", parameter

    def save_checkpoint(self) -> None:
        """Write ``checkpoints/step-N``."""
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        checkpoints.save(
            self.folder / "checkpoints",
            Checkpoint(
                step=self.step,
                adapter={name: p.detach().cpu().contiguous() for name, p in self._named_parameters()},
                optimizer=self.optimizer.state_dict(),
                config=self.asked.model_dump(mode="json"),
                data=self.data_digest,
                losses=self.losses,
                seconds=self.seconds,
                plugins=self.plugins.state_dict() if self.plugins.plugins else {},
                ema=self.ema.state_dict() if self.ema is not None else None,
                scaler=scaler.state_dict() if scaler is not None else None,
            ),
            keep=self.config.keep_checkpoints,
        )

    # ---------------------------------------------------------------- the loop
    def train(self) -> dict[str, Any]:
        """Run to the end; see :func:`run` for the result."""
        config = self.config
        if hasattr(self.optimizer.optimizer, "train"):  # schedule-free optimisers have two modes
            self.optimizer.optimizer.train()
        if self.step == 0 and config.sample_at_start:
            self.sample()
        batches = self.supply.stream(
            self.step * config.gradient_accumulation, self.total * config.gradient_accumulation
        )
        while self.step < self.total:
            self._stop_if_asked()
            began = time.perf_counter()
            loss, norm, logs = self.optimiser_step(batches)
            self.step += 1
            took = time.perf_counter() - began
            self.seconds += took
            self.losses.append(loss)
            validation = self._validate() if due(self.step, config.validation_every) and self.validation else None
            self._record(loss, norm, took, logs, validation)
            if due(self.step, config.sample_every):
                self.sample()
            if due(self.step, config.save_every) and self.step < self.total:
                self._save_intermediate()
            if due(self.step, config.checkpoint_every) and self.step < self.total:
                self.save_checkpoint()
        return self._finish()

    def _stop_if_asked(self) -> None:
        asked = torch.tensor(float(self.monitor.cancelled()), device=self.accelerator.device)
        if float(self.accelerator.reduce(asked, "sum")):
            self.save_checkpoint()
            raise Cancelled(f"Stopped at step {self.step} of {self.total}; the run can be resumed.")

    def optimiser_step(self, batches: Iterator[Batch]) -> tuple[float, float, dict[str, float]]:
        """One optimiser step: (mean loss over forward passes and processes, gradient norm, plugin logs)."""
        config, accelerator = self.config, self.accelerator
        self._set_rates()
        self.plugins.step_begin(self.step)
        text_rests = config.text_encoder_stop is not None and self.step >= config.text_encoder_stop
        if text_rests and accelerator.num_processes == 1:
            accelerator.unwrap_model(self.trainee).text_learns = False
        total, norm = torch.zeros((), device=accelerator.device), 0.0
        logs: dict[str, float] = {}
        for part in range(config.gradient_accumulation):
            batch = next(batches)
            with accelerator.accumulate(self.trainee):
                with self._dropout_seed(part), self.plugins.forward_context():
                    loss, outputs = self.forward(batch)
                    loss, logs = self.plugins.loss(loss, outputs)
                total += loss.detach() / config.gradient_accumulation
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    self._check_finite(total)
                    if text_rests:
                        for parameter in self.text_parameters:
                            parameter.grad = None
                    accelerator.unscale_gradients()
                    self.plugins.grads_ready(self.step)
                    limit = config.max_grad_norm or math.inf
                    norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
                self.optimizer.step()
                self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.plugins.after_step(self.step)
        return float(accelerator.reduce(total, "mean")), norm, logs

    def forward(self, batch: Any) -> tuple[torch.Tensor, Outputs]:
        """The loss of one batch of the supply, with gradients."""
        draws = draw(batch, self.config, self.config.seed)
        return training_loss(self.trainee, self.family, batch, draws, self.config, self.accelerator.device, self.dtype)

    def _set_rates(self) -> None:
        factor = lr_factor(self.step, self.total, self.config)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _dropout_seed(self, part: int) -> Any:
        if not self.config.dropout:
            return nullcontext()
        number = self.step * self.config.gradient_accumulation + part
        return global_seed(self.config.seed, f"dropout-{self.accelerator.process_index}", number)

    def _check_finite(self, loss: torch.Tensor) -> None:
        finite = bool(torch.isfinite(self.accelerator.reduce(loss.clone(), "sum")))
        if not finite:
            kept = checkpoints.existing(self.folder / "checkpoints")
            last = f"the checkpoint '{kept[-1].name}' is kept" if kept else "no checkpoint had been written yet"
            raise InputError(
                f"The loss is not finite at step {self.step + 1}; {last}. "
                "Lower learning_rate, or compute in bf16 or fp32."
            )

    # ---------------------------------------------------------------- looking and saving
    def _best_weights(self) -> AbstractContextManager[None]:
        """Inside, the models hold the weights that are saved."""
        return averaged(self.optimizer.optimizer, self.parameters, self.ema)

    def _validate(self) -> float:
        self.trainee.eval()
        try:
            with self._best_weights():
                return validation_loss(
                    self.trainee, self.family, self.validation, self.config, self.accelerator.device, self.dtype
                )
        finally:
            self.trainee.train()

    def sample(self) -> list[Path]:
        """Draw the sample prompts with the weights as they would be saved."""
        if not (self.accelerator.is_main_process and self.prompts):
            return []
        with self._best_weights(), self.sampling() as config:
            pictures = draw_samples(self.family.pipe, self.prompts, self.rule.square, config, self.accelerator.device)
        files = save_samples(pictures, self.folder / "samples", self.step)
        for file in files:
            self.monitor.report(Progress("sampling", self.step, self.total, preview=str(file)))
        return files

    @contextmanager
    def sampling(self) -> Iterator[TrainImageConfig]:
        """Around drawing samples: what the pipeline needs for it, and the settings to draw with."""
        yield self.config

    def _layers(self) -> Layers:
        return {name: lora_layers(model) for name, model in self.models.items()}

    def _final_layers(self) -> Layers:
        with self._best_weights():
            layers = self._layers()
        return self.plugins.finalize(layers)

    def _save_intermediate(self) -> None:
        if not self.accelerator.is_main_process:
            return
        folder = self.folder / "saved"
        self.write(folder, f"{self.config.name}-{self.step:06d}", self._recipe())
        steps: dict[int, list[Path]] = {}
        for file in folder.iterdir():
            rest = file.name.removeprefix(f"{self.config.name}-")
            if rest != file.name and rest[:6].isdigit():  # "-000100.safetensors", "-000100-peft" ...
                steps.setdefault(int(re.split(r"\D", rest)[0]), []).append(file)
        for step in sorted(steps)[: -self.config.keep_last]:
            for file in steps[step]:
                shutil.rmtree(file) if file.is_dir() else file.unlink()

    def write(self, folder: Path, name: str, recipe: dict[str, Any]) -> dict[str, str]:
        """Write the adapter as it is now; returns format -> path."""
        return write_adapter(self._final_layers(), folder, name, self.config, recipe)

    def write_card(self, recipe: dict[str, Any], samples: list[Path]) -> Path:
        """Write the adapter's card; returns its path."""
        return write_card(self.folder, recipe, samples)

    def _record(self, loss: float, norm: float, took: float, logs: dict[str, float], validation: float | None) -> None:
        if not self.accelerator.is_main_process:
            return
        rate = self.optimizer.param_groups[0]["lr"]
        values = {"learning_rate": rate, "grad_norm": norm}
        self.curve.add(step=self.step, loss=loss, seconds=round(took, 4), validation_loss=validation, **values)
        shown = values | logs | {"steps_per_second": 1 / took, "epoch": self._epoch}
        if validation is not None:
            shown["validation_loss"] = validation
        if self.config.tracker != "none":
            self.accelerator.log({"loss": loss, **shown}, step=self.step)
        self.monitor.report(Progress("training", self.step, self.total, loss=loss, metrics=shown))

    @property
    def _epoch(self) -> float:
        return self.step * self.config.gradient_accumulation / self.plan.epoch_length

    def _recipe(self) -> dict[str, Any]:
        config = self.config
        return make_recipe(
            self.asked,
            base={"name": config.base, "family": self.family.name, "digest": self.base_digest},
            data=self.data_facts(),
            training={
                "steps": self.step,
                "batch": config.batch_size * config.gradient_accumulation * self.accelerator.num_processes,
                "loss": recent(self.losses),
                "seconds": round(self.seconds, 2),
            },
        )

    def data_facts(self) -> dict[str, Any]:
        """What the recipe says of the data."""
        shown = self.plan.shown
        return {
            "pictures": len(shown),
            "digest": self.data_digest,
            "example_prompt": shown.captions[0],
            "resolution": self.rule.resolution,
        }

    def _finish(self) -> dict[str, Any]:
        """Save the adapter, draw the last samples, write the card."""
        last_due = due(self.step, self.config.sample_every)
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return {}
        recipe = self._recipe()
        paths = self.write(self.folder, self.config.name, recipe)
        if not last_due:
            self.sample()
        samples = sorted((self.folder / "samples").glob("*.png"))
        latest = [file for file in samples if file.name.startswith(f"step-{self.step:06d}-")]
        card = self.write_card(recipe, latest)
        return {
            "adapter": paths["diffusers"],
            "exports": paths,
            "card": str(card),
            "loss": recent(self.losses),
            "first_loss": self.losses[0],
            "steps": self.step,
            "samples": [str(file) for file in samples],
            "seconds": round(self.seconds, 3),
            "steps_per_second": self.step / self.seconds if self.seconds else 0.0,
            "parameters": sum(parameter.numel() for parameter in self.parameters),
            "triggers": recipe["triggers"],
        }

    def close(self) -> None:
        """End trackers."""
        if self.config.tracker != "none" and self.accelerator.is_main_process:
            self.accelerator.end_training()
