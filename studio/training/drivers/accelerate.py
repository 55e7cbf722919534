"""The first driver: a loop on accelerate.

Order of one optimiser step: the task's loss and backward for each forward pass; then, with the gradients of all
processes reduced, plugins see them, they are clipped, the optimiser steps, and the session follows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from adapters.errors import InputError
from adapters.plugin import Calibration, Closure
from pipelines.precision import choose_dtype
from studio import devices
from studio.datasets.seeds import global_seed
from studio.training import checkpoint as checkpoints
from studio.training.checkpoint import Checkpoint
from studio.training.device import main_process, make_accelerator
from studio.training.inject import trainable
from studio.training.optimizers import lr_factor, make_optimizer, parameter_groups
from studio.training.session import Keep, TrainSession


def train(session: TrainSession, resume: bool = False, keep: Keep = False) -> dict[str, Any]:
    """Run the session to its end, or ``keep`` a checkpoint or its start as the adapter; returns its result."""
    device = devices.resolve(session.config.device)
    session.dtype = choose_dtype(session.config.dtype, torch.device(device))
    session.accelerator = make_accelerator(session.config, session.dtype, device, session.folder)
    session.device = session.accelerator.device
    with global_seed(session.config.seed, "run", session.accelerator.process_index):
        loop = Loop(session)
        try:
            loop.prepare(resume, keep)
            return session.finish() if keep else loop.run()
        finally:
            loop.close()


class Loop:
    """The steps of one session.

    Attributes:
        trainee: everything that learns as one module, prepared for the processes.
        optimizer: the prepared optimiser.
    """

    def __init__(self, session: TrainSession) -> None:
        self.session, self.task, self.config = session, session.task, session.config
        self.accelerator, self.plugins = session.accelerator, session.plugins
        self._tracks = False

    def prepare(self, resume: bool = False, keep: Keep = False) -> None:
        """Base, data, adapter, optimiser and, to ``resume`` or ``keep`` one, the newest checkpoint."""
        session, config = self.session, self.config
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
        session.prepare()
        saved = session.found(resume, keep)
        calibration = None
        if "calibration" in self.plugins.needs() and saved is None:
            rate = config.learning_rate * lr_factor(0, self._total, config)
            calibration = Calibration(self._calibration_losses, rate)
        self.plugins.initialise(session.handles(calibration=calibration))
        module = self.task.trainee()
        text = [model for name, model in session.models.items() if name.startswith("text_encoder")]
        self.text_parameters = [parameter for model in text for parameter in trainable(model)]
        optimizer = make_optimizer(parameter_groups(session.models, next(iter(session.models)), config), config)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.trainee, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.task.learner = self.trainee
        session.begin(self.optimizer.optimizer)
        self.plugins.after_inject(session.handles(optimizer=session.optimizer))
        session.start_average(saved.ema if saved else None)
        self.trainee.train()
        if saved is not None:
            self._take(saved)
        session.open_records()
        if config.tracker != "none":
            self.accelerator.init_trackers(config.name)
            self._tracks = True

    @property
    def _total(self) -> int:
        return self.session.total

    def _take(self, saved: Checkpoint) -> None:
        self.session.take(saved)
        self.optimizer.load_state_dict(saved.optimizer)
        if self.accelerator.scaler is not None and saved.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.scaler)

    def _calibration_losses(self, count: int) -> Iterator[Closure]:
        """Show the first batches to plugins that need them."""
        for batch in self.task.collate(0, count):
            yield partial(self._calibration_loss, batch)

    def _calibration_loss(self, batch: Any) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.task.loss(batch)[0]

    def run(self) -> dict[str, Any]:
        """Run the remaining steps."""
        session, config = self.session, self.config
        if hasattr(session.optimizer, "train"):  # schedule-free optimisers have two modes
            session.optimizer.train()
        if session.step == 0:
            self.task.before_first()
            if config.sample_at_start:
                session.sample()
        batches = self.batches()
        while session.step < self._total:
            if session.stop_asked():
                self._save_checkpoint()
                raise session.stopped()
            began = time.perf_counter()
            loss, norm, logs = self.optimiser_step(batches)
            took = time.perf_counter() - began
            shown = session.follow(loss, norm, self.optimizer.param_groups[0]["lr"], took, logs)
            if self._tracks:
                self.accelerator.log({"loss": loss, **shown}, step=session.step)
            if session.checkpoint_due():
                self._save_checkpoint()
        return session.finish()

    def batches(self) -> Iterator[Any]:
        """The remaining batches."""
        parts = self.config.gradient_accumulation
        return self.task.collate(self.session.step * parts, self._total * parts)

    def optimiser_step(self, batches: Iterator[Any]) -> tuple[float, float, dict[str, float]]:
        """One optimiser step: (mean loss over forward passes and processes, gradient norm, plugin logs)."""
        config, accelerator, step = self.config, self.accelerator, self.session.step
        factor = lr_factor(step, self._total, config)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.plugins.step_begin(step)
        text_rests = bool(self.text_parameters) and config.text_encoder_stop is not None
        text_rests = text_rests and step >= config.text_encoder_stop
        if text_rests and accelerator.num_processes == 1:
            accelerator.unwrap_model(self.trainee).text_learns = False
        total, norm = torch.zeros((), device=accelerator.device), 0.0
        logs: dict[str, float] = {}
        try:
            for part in range(config.gradient_accumulation):
                batch = next(batches)
                with accelerator.accumulate(self.trainee):
                    with self._dropout_seed(part), self.plugins.forward_context():
                        loss, outputs = self.task.loss(batch)
                        loss, logs = self.plugins.loss(loss, outputs)
                    total += loss.detach() / config.gradient_accumulation
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        self._check_finite(total)
                        if text_rests:
                            for parameter in self.text_parameters:
                                parameter.grad = None
                        accelerator.unscale_gradients()
                        self.plugins.grads_ready(step)
                        limit = config.max_grad_norm or math.inf
                        norm = float(torch.nn.utils.clip_grad_norm_(self.session.parameters, limit))
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        finally:
            self.task.after_step()
        self.session.step_average()
        self.plugins.after_step(step)
        return float(accelerator.reduce(total, "mean")), norm, logs

    def _dropout_seed(self, part: int) -> Any:
        if not self.config.dropout:
            return nullcontext()
        number = self.session.step * self.config.gradient_accumulation + part
        return global_seed(self.config.seed, f"dropout-{self.accelerator.process_index}", number)

    def _check_finite(self, loss: torch.Tensor) -> None:
        if bool(torch.isfinite(self.accelerator.reduce(loss.clone(), "sum"))):
            return
        kept = checkpoints.existing(self.session.folder / "checkpoints")
        last = f"the checkpoint '{kept[-1].name}' is kept" if kept else "no checkpoint had been written yet"
        raise InputError(
            f"The loss is not finite at step {self.session.step + 1}; {last}. "
            "Lower learning_rate, or compute in bf16 or fp32."
        )

    def _save_checkpoint(self) -> None:
        scaler = self.accelerator.scaler
        self.session.save_checkpoint(self.optimizer.state_dict(), scaler.state_dict() if scaler is not None else None)

    def close(self) -> None:
        """Close trackers; let the task undo its changes."""
        if self._tracks and main_process():
            self.accelerator.end_training()
        self.task.close()
