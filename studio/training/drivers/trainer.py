"""The second driver: transformers' Trainer, for models that give their own loss.

The Trainer runs the steps with :class:`~studio.training.trainer_mixin.StudioTrainerMixin`; the session follows them,
and writes and loads the checkpoints. Random numbers and the order of samples are functions of seed and step, so a
resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from adapters.formats import LoraFile
from pipelines.language.adapters import read_fitting
from studio import devices
from studio.datasets.seeds import global_seed, rng
from studio.training.checkpoint import Checkpoint
from studio.training.device import fresh_state, own_device, processes
from studio.training.optimizers import lr_factor, make_optimizer, parameter_groups
from studio.training.session import Keep, TrainSession
from studio.training.task import Task
from studio.training.trainer_mixin import COMPONENT, StudioTrainerMixin

Sample = Mapping[str, Any]
Batch = dict[str, torch.Tensor]


class TrainerTask(Task):
    """A task whose one model, called ``model``, computes the loss of a batch itself.

    Attributes:
        samples: what is trained on, by number; set by :meth:`encode`.
        collator: makes a batch of samples; set by :meth:`encode`.
        base: the opened base; its ``model`` gets the adapter.
        learner: the model with its adapter; set by :meth:`inject`.
        fits: reads an adapter and checks that it fits the model.
    """

    samples: Sequence[Sample]
    collator: Callable[[Sequence[Sample]], Batch]
    base: Any
    learner: Any
    fits: Callable[[Path, nn.Module, str], LoraFile] = staticmethod(read_fitting)

    def components(self) -> dict[str, Any]:
        return {COMPONENT: self.base.model}

    def earlier(self, models: Mapping[str, Any]) -> LoraFile | None:
        if not self.config.continue_from:
            return None
        from studio import library

        return self.fits(library.resolve_adapter(self.config.continue_from), self.base.model, self.config.base)

    def trainee(self) -> nn.Module:
        model: nn.Module = self.learner
        return model

    def change(self, batch: Batch, stream: str, number: int) -> Batch:
        """Batch ``number`` in the model's form; random numbers come from ``stream``."""
        return batch

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimiser step over all processes."""
        return int(self.config.batch_size * self.config.gradient_accumulation * processes())

    def epoch(self, step: int) -> float:
        return step * self.samples_per_step / len(self.samples)


class SampleSet(Dataset[Sample]):
    """Samples by number."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Sample:
        return self.samples[number]


class RunSampler(Sampler[int]):
    """The whole run as one pass: permutations of the samples, each a function of seed and number."""

    def __init__(self, samples: int, total: int, seed: int) -> None:
        self.samples, self.total, self.seed = samples, total, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        given = 0
        while given < self.total:
            order = list(range(self.samples))
            rng(self.seed, "data", given // self.samples).shuffle(order)
            yield from order[: self.total - given]
            given += self.samples


def train(session: TrainSession, resume: bool = False, keep: Keep = False) -> dict[str, Any]:
    """Run the session to its end, or ``keep`` a checkpoint or its start as the adapter; returns its result."""
    device = own_device(devices.resolve(session.config.device))
    session.device = torch.device(device)
    with fresh_state(device), global_seed(session.config.seed, "run"):
        try:
            session.prepare()
            saved = session.found(resume, keep)
            trainer = SessionTrainer(session, saved)
            session.accelerator = trainer.accelerator
            if session.member is not None:
                session.member.join(
                    session.models[COMPONENT], trainer.accelerator, session.config.gradient_checkpointing, session.dtype
                )
            session.open_records()
            if keep:
                trainer.take_up()
                return session.finish()
            trainer.train(resume_from_checkpoint=str(saved.folder) if saved is not None else None)
            if trainer.stopped:
                raise session.stopped()
            return session.finish()
        finally:
            session.task.close()


class SessionTrainer(StudioTrainerMixin, Trainer):  # type: ignore[misc]  # the mixin takes what any trainer takes
    """Transformers' trainer, with the session's methods, optimiser, order of samples and checkpoints.

    Attributes:
        stopped: a stop was requested, and the checkpoint is written.
    """

    def __init__(self, session: TrainSession, saved: Checkpoint | None) -> None:
        self.session, self.saved, self.stopped = session, saved, False
        task, config = session.task, session.config
        assert isinstance(task, TrainerTask)
        self.task: TrainerTask = task
        super().__init__(
            model=task.trainee(),
            args=arguments(session),
            data_collator=task.collator,
            train_dataset=SampleSet(task.samples),
            plugins=session.plugins,
            optimizer_of=self._make_optimizer,
            first_rate=config.learning_rate * lr_factor(0, session.total, config),
            callbacks=[_Follow(self)],
        )
        self._chosen = session.plugins.batches(len(task.samples), config.batch_size, session.total)
        self.remove_callback(PrinterCallback)  # it would print a table of its own
        self.args._n_gpu = min(1, self.args.n_gpu)  # several GPUs: accelerate launch, not DataParallel

    def _make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.session.config
        return make_optimizer(parameter_groups({COMPONENT: model}, COMPONENT, config), config)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser; now everything that learns exists, and a checkpoint is loaded."""
        made = super().create_optimizer(model)
        session, saved = self.session, self.saved
        session.begin(made)
        session.start_average(saved.ema if saved else None)
        if saved is not None:
            session.take(saved)
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The configured learning rate over the run."""
        if self.lr_scheduler is None:
            total, config = self.session.total, self.session.config
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: lr_factor(step, total, config)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_train_dataloader(self) -> Any:
        """The run's batches, unless a method chooses them itself."""
        if self._chosen is None:
            return super().get_train_dataloader()
        return DataLoader(SampleSet(self.task.samples), batch_sampler=self._chosen, collate_fn=self.data_collator)

    def _get_train_sampler(self, *args: Any, **options: Any) -> RunSampler:
        return RunSampler(len(self.task.samples), self.task.total * self.task.samples_per_step, self.task.config.seed)

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        """The batches of one optimiser step, as the task changes them."""
        batches, count = super().get_batch_samples(*args, **options)
        first = int(self.state.global_step) * self.args.gradient_accumulation_steps
        changed = [self.task.change(batch, "mask", first + number) for number, batch in enumerate(batches)]
        if all(new is old for new, old in zip(changed, batches, strict=True)):
            return batches, count
        return changed, self._get_num_items_in_batch(changed, self.args.device)

    def calibration_batch(self, batch: Any, number: int) -> Any:
        return self.task.change(batch, "calibration", number)

    def one_pass(self, model: Any, inputs: Any, *args: Any, **options: Any) -> torch.Tensor:
        """Forward and backward, through a base that other trainings may share."""
        member = self.session.member
        if member is None:
            return super().one_pass(model, inputs, *args, **options)
        with member.step():
            loss = super().one_pass(model, inputs, *args, **options)
        member.backward()
        return loss

    # ---------------------------------------------------------------- checkpoints are the session's
    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        scaler = self.accelerator.scaler
        self.session.save_checkpoint(
            self.optimizer.state_dict(),
            scaler.state_dict() if scaler is not None else None,
            json.dumps(dataclasses.asdict(self.state), indent=1, sort_keys=True),
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Does nothing: :meth:`create_optimizer` loads it when all parameters exist."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.saved is None:
            return
        self.optimizer.load_state_dict(self.saved.optimizer)
        schedule: Any = self.lr_scheduler
        schedule.last_epoch = self.saved.step
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def take_up(self) -> None:
        """Load the checkpoint, or start the adapter, without taking a step."""
        self.start_methods(resumed=self.saved is not None)
        self.create_optimizer()
        if self.saved is not None:
            self.optimizer.load_state_dict(self.saved.optimizer)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.saved is not None and self.saved.scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.saved.scaler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Does nothing: random numbers are functions of the seed and the step."""


class _Follow(TrainerCallback):
    """Reports every optimiser step to the session, and asks the trainer to save or stop."""

    def __init__(self, trainer: SessionTrainer) -> None:
        self.trainer, self.session = trainer, trainer.session
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.session.step == 0:
            self.session.task.before_first()
            if self.session.config.sample_at_start:
                self.session.sample()

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._began = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.session.step_average()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        session, trainer = self.session, self.trainer
        took, loss = time.perf_counter() - self._began, trainer.mean_loss()
        shown = session.follow(loss, trainer.last_norm, trainer.used_rate, took, trainer.step_logs)
        if session.config.tracker != "none":
            trainer.log({"loss": loss, **shown})
        control.should_save = control.should_save or session.checkpoint_due()
        if session.step < session.total and session.stop_asked():
            trainer.stopped = control.should_training_stop = control.should_save = True


def arguments(session: TrainSession) -> TrainingArguments:
    """The configuration as the Trainer's arguments; saving, logging and measuring are the session's."""
    config = session.config
    options: dict[str, Any] = {"tf32": config.tf32} if session.device.type == "cuda" else {}
    if config.gradient_checkpointing:
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(session.folder / "checkpoints"),
        run_name=config.name,
        max_steps=session.total,
        seed=config.seed,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        max_grad_norm=config.max_grad_norm,
        learning_rate=config.learning_rate,
        use_cpu=session.device.type == "cpu",
        bf16=session.dtype == torch.bfloat16,
        fp16=session.dtype == torch.float16,
        dataloader_num_workers=config.workers,
        neftune_noise_alpha=getattr(config, "neftune_alpha", None),
        remove_unused_columns=False,
        label_names=["labels"],
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        report_to=[] if config.tracker == "none" else [config.tracker],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **options,
    )
