"""One training run, whatever is trained and whichever driver runs the steps.

The session prepares a task (methods, injection), holds the run's state (step, losses, adapter tensors, running
average), writes and loads checkpoints, follows every step, and exports the adapter with its card. A driver makes the
optimiser and calls :meth:`TrainSession.follow` after each of its steps. Only the main process writes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from adapters.errors import Cancelled, InputError
from adapters.files import whole
from adapters.formats.coverage import Coverage, told
from adapters.plugin import Handles, Layers, Plugin, Plugins
from adapters.progress import Monitor, Progress, Silent
from studio.datasets.seeds import global_seed
from studio.training import checkpoint as checkpoints
from studio.training.checkpoint import Checkpoint
from studio.training.device import main_process, processes
from studio.training.export import make_recipe
from studio.training.inject import lora_layers, start_from, trainable
from studio.training.optimizers import averaged, running_average
from studio.training.records import LossCurve, check_tracker, due, recent
from studio.training.task import Measures, Task

if TYPE_CHECKING:
    from studio.training.drivers.packed import Member

SILENT = Silent()

Keep = bool | int | Literal["start"]
"""What to save instead of training: nothing (False), the newest checkpoint (True), that of a step (its number), or the
adapter as the run would start ("start")."""

SNAPSHOTS = "snapshots"
"""Folder with the adapter after each of the last steps (``snapshots`` in the configuration)."""

DEAD_STEPS = 5
"""A run ends after so many steps without a gradient at more than twice the first loss."""


@dataclass
class TrainSession:
    """One run of ``task`` in ``folder``.

    Attributes:
        plugins: the training methods, those of the configuration first.
        device, dtype, accelerator: set by the driver before :meth:`prepare`.
        models: component -> model with its adapter, after :meth:`prepare`.
        reach: component -> which share of its layers has an adapter, after :meth:`prepare`.
        parameters: everything that learns, after :meth:`begin`; so is ``optimizer`` (unwrapped).
        member: what it shares with other trainings on the same base; None = it has the base alone.
        step, losses, seconds, validation: its progress; ``validation`` holds the measures by step.
    """

    task: Task
    folder: Path
    monitor: Monitor
    plugins: Plugins

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    accelerator: Any = None
    member: Member | None = None
    models: dict[str, Any] = field(default_factory=dict)
    reach: dict[str, Coverage] = field(default_factory=dict)
    parameters: list[nn.Parameter] = field(default_factory=list)
    optimizer: Any = None
    average: Any = None
    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    validation: list[dict[str, float]] = field(default_factory=list)
    _norms: list[float] = field(default_factory=list)
    _sampled: int = -1

    @classmethod
    def of(cls, task: Task, folder: Path, monitor: Monitor, plugins: Sequence[Plugin] = ()) -> TrainSession:
        """The session of a task; its data is read first, before anything large is loaded."""
        check_tracker(task.config.tracker)
        task.rows()
        monitor.report(Progress("loading", message=f"Loading the base model {task.config.base}"))
        listening = monitor if main_process() else SILENT
        return cls(task, Path(folder), listening, Plugins([*task.methods(), *plugins]))

    @property
    def config(self) -> Any:
        return self.task.config

    @property
    def total(self) -> int:
        return self.task.total

    # ---------------------------------------------------------------- preparation
    def prepare(self) -> None:
        """Prepare base, data and adapters; methods see the models before the injection."""
        task = self.task
        task.open(self)
        self.plugins.configure(self.config)
        task.check()
        self.base_digest = task.digest()
        task.encode()
        models = task.components()
        self.plugins.before_inject(models)
        earlier = task.earlier(models)
        with global_seed(self.config.seed, "init"):
            self.models = task.inject(models)
        self.reach = task.reach()
        self.monitor.report(Progress("data", message=f"The {task.learner_noun} changes {told(self.reach)}"))
        if earlier is not None:
            start_from(models, earlier)

    def handles(self, **more: Any) -> Handles:
        """The context for plugins."""
        return Handles(self.models, steps=self.total, seed=self.config.seed, **more)

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Called when the optimiser exists, and with it everything that learns."""
        self.optimizer = optimizer
        self.parameters = [parameter for model in self.models.values() for parameter in trainable(model)]

    def start_average(self, state: dict[str, Any] | None = None) -> None:
        """Make the running average, if configured, and load the ``state`` of a checkpoint into it."""
        self.average = running_average(self.parameters, self.config)
        if self.average is not None and state is not None:
            self.average.load_state_dict(state)
            self.average.to(self.device)

    # ---------------------------------------------------------------- start and resume
    def found(self, resume: bool, keep: Keep = False) -> Checkpoint | None:
        """The newest checkpoint of this run, if it is to be resumed and there is one.

        Raises:
            InputError: it is damaged, has another configuration or other data, or there is none to ``keep`` (True: the
                newest; a number: that step's).
        """
        if keep == "start":
            return None
        places = checkpoints.existing(self.folder / "checkpoints") if resume or keep else []
        if keep and keep is not True:
            steps = {checkpoints.step_of(place): place for place in places}
            if keep not in steps:
                shown = ", ".join(map(str, steps)) or "none"
                raise InputError(
                    f"There is no checkpoint of step {keep} in '{self.folder}' (there are: {shown}); its folder "
                    "'saved' may have adapters of other steps."
                )
            places = [steps[keep]]
        saved = checkpoints.load(places[-1]) if places else None
        if keep and (saved is None or saved.step == 0):
            raise InputError(f"There is no checkpoint in '{self.folder}' that could become an adapter: train first.")
        if saved is None:
            return None
        checkpoints.check_same_run(saved, self.task.asked, self.task.data_digest, self.task.data_noun)
        self.step, self.losses, self.seconds = saved.step, saved.losses, saved.seconds
        self.validation = saved.validation
        return saved

    def open_records(self) -> None:
        """Clear the files of an earlier run unless this one resumes it; write the configuration."""
        if not main_process():
            return
        if self.step == 0:
            for old in (*self.task.leftovers, SNAPSHOTS):
                place = self.folder / old
                shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
        self.task.rewind(self.step)
        with whole(self.folder / "config.yaml") as part:
            part.write_text(self.task.asked.to_yaml(), encoding="utf-8")
        self.curve = LossCurve(self.folder / "loss.csv", self.step)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything that learns, by component and name."""
        for component, model in self.models.items():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    yield f"{component}.{name}", parameter

    def take(self, saved: Checkpoint) -> None:
        """Load the methods' states and the adapter tensors of a checkpoint.

        Raises:
            InputError: its parameters are not those this run trains.
        """
        self.plugins.load_state_dict(saved.plugins)
        checkpoints.take_parameters(dict(self.named_parameters()), saved.adapter)

    def save_checkpoint(self, optimizer: dict[str, Any], scaler: dict[str, Any] | None, trainer: str = "") -> None:
        """Write ``checkpoints/step-N`` with the driver's states."""
        if not main_process():
            return
        checkpoints.save(
            self.folder / "checkpoints",
            Checkpoint(
                step=self.step,
                adapter={name: p.detach().cpu().contiguous() for name, p in self.named_parameters()},
                optimizer=optimizer,
                config=self.task.asked.model_dump(mode="json"),
                data=self.task.data_digest,
                losses=self.losses,
                seconds=self.seconds,
                plugins=self.plugins.state_dict() if self.plugins.plugins else {},
                ema=self.average.state_dict() if self.average is not None else None,
                scaler=scaler,
                validation=self.validation,
                trainer=trainer,
            ),
            keep=self.config.keep_checkpoints,
        )

    # ---------------------------------------------------------------- after every step
    def step_average(self) -> None:
        """Update the running average after an optimiser step."""
        if self.average is not None:
            self.average.step(self.parameters)

    def follow(self, loss: float, norm: float, rate: float, took: float, logs: dict[str, float]) -> dict[str, float]:
        """Record a step (``loss`` is the mean over the processes); measure, sample and save when due.

        Returns:
            What a tracker logs besides the loss.
        """
        self.step += 1
        self.seconds += took
        self.losses.append(loss)
        self._norms = [*self._norms, norm][-DEAD_STEPS:]
        self.check_alive()
        found = self.measure() if due(self.step, self.config.validation_every) and self.task.measurable else {}
        values = {"learning_rate": rate, "grad_norm": norm}
        shown = values | logs | {"steps_per_second": 1 / took, "epoch": self.task.epoch(self.step)} | found
        if main_process():
            self.curve.add(
                step=self.step, loss=loss, seconds=round(took, 4), validation_loss=found.get("validation_loss"),
                **values,
            )  # fmt: skip
            self.monitor.report(Progress("training", self.step, self.total, loss=loss, metrics=shown))
        if due(self.step, self.config.sample_every, self.total):
            self.sample()
        if due(self.step, self.config.save_every, self.total) and self.step < self.total:
            self._save_intermediate()
        if self.total - self.step < self.config.snapshots:
            self._save_snapshot()
        return shown

    def check_alive(self) -> None:
        """Raise :class:`InputError` when the run has diverged to where no gradient leads back."""
        dead = len(self._norms) == DEAD_STEPS and self.config.max_grad_norm > 0 and not any(self._norms)
        if dead and min(self.losses[-DEAD_STEPS:]) > 2 * self.losses[0] > 0:
            raise InputError(f"The training has diverged: {self._rise()}, and no gradient is left. {self._advice()}")

    def diverged(self) -> str:
        """A sentence if the loss ended far above its start, else empty."""
        if len(self.losses) >= 20 and self.task.rose(self.losses[0], recent(self.losses)):
            return f"The training has probably diverged: {self._rise()}. {self._advice()}"
        return ""

    def _rise(self) -> str:
        return f"the loss rose from {self.losses[0]:.4g} to {recent(self.losses):.4g} in {self.step} steps"

    def _advice(self) -> str:
        return f"Lower learning_rate (it is {self.config.learning_rate:g}) and start a new run."

    def checkpoint_due(self) -> bool:
        """Whether the driver has to write a checkpoint now."""
        return due(self.step, self.config.checkpoint_every) and self.step < self.total

    def stop_asked(self) -> bool:
        """Whether any process was asked to stop; all of them must call this."""
        asked = torch.tensor(float(self.monitor.cancelled()), device=self.device)
        return bool(self.accelerator.reduce(asked, "sum"))

    def stopped(self) -> Cancelled:
        """Save the adapter learnt so far; returns the exception that ends the run."""
        if self.step:
            self._save_intermediate()
        return Cancelled(f"Stopped at step {self.step} of {self.total}; the run can be resumed.")

    def best_weights(self) -> AbstractContextManager[None]:
        """Inside, the models hold the weights that are saved."""
        return averaged(self.optimizer, self.parameters, self.average)

    def measure(self) -> Measures:
        """Measures on held-out data, with the weights that would be saved."""
        with self.best_weights():
            found = self.task.measure()
        self.validation.append({"step": self.step, **found})
        return found

    def sample(self) -> None:
        """Answer or draw the sample prompts with the weights that would be saved."""
        self._sampled = self.step
        if main_process() and self.task.samples_wanted:
            with self.best_weights():
                self.task.sample(self.step)

    # ---------------------------------------------------------------- saving
    def layers(self) -> Layers:
        """The adapter in the form to save: component -> module path -> layer."""
        with self.best_weights():
            layers = {name: lora_layers(model) for name, model in self.models.items()}
        return self.plugins.finalize(layers)

    def recipe(self) -> dict[str, Any]:
        """Everything needed to make the adapter again."""
        base, data = self.task.facts()
        config = self.config
        training: dict[str, Any] = {
            "steps": self.step,
            "batch": config.batch_size * config.gradient_accumulation * processes(),
            "loss": recent(self.losses),
            "seconds": round(self.seconds, 2),
            "layers": {name: str(one) for name, one in self.reach.items()},
        }
        return make_recipe(
            self.task.asked, base={"name": config.base, **base, "digest": self.base_digest}, data=data,
            training=training | self.task.trained() | dict(self.plugins.recorded()),
        )  # fmt: skip

    def _save_intermediate(self) -> None:
        if not main_process():
            return
        folder = self.folder / "saved"
        self.task.export(self.layers(), folder, f"{self.config.name}-{self.step:06d}", self.recipe())
        steps: dict[int, list[Path]] = {}
        for file in folder.iterdir():
            rest = file.name.removeprefix(f"{self.config.name}-")
            if rest != file.name and rest[:6].isdigit():  # "-000100.safetensors", "-000100-peft" ...
                steps.setdefault(int(re.split(r"\D", rest)[0]), []).append(file)
        for step in sorted(steps)[: -self.config.keep_last]:
            for file in steps[step]:
                shutil.rmtree(file) if file.is_dir() else file.unlink()

    def _save_snapshot(self) -> None:
        """Keep the adapter as it is now, in one file or folder of :data:`SNAPSHOTS`, for a generator of adapters."""
        if not main_process():
            return
        name = f"{self.config.name}-{self.step:06d}"
        _, *copies = self.task.export(self.layers(), self.folder / SNAPSHOTS, name, self.recipe()).values()
        for copy in map(Path, copies):  # the same adapter in other formats
            shutil.rmtree(copy) if copy.is_dir() else copy.unlink()

    def finish(self) -> dict[str, Any]:
        """Save the adapter, sample with and without it, write the card; returns the result (empty in other
        processes)."""
        self.accelerator.wait_for_everyone()
        task = self.task
        measured = bool(self.validation) and self.validation[-1]["step"] == self.step
        wanted = task.measures_at_end or self.step == 0  # a start is saved to look at it
        if wanted and task.measurable and not measured:
            self.measure()
        if not main_process():
            return {}
        recipe = self.recipe()
        paths = task.export(self.layers(), self.folder, self.config.name, recipe)
        if self._sampled != self.step:
            self.sample()
        if task.samples_wanted:
            task.sample_without()
        card = task.card(recipe)
        warning = self.diverged()
        if warning:
            self.monitor.report(Progress("training", self.step, self.total, message=warning))
        return {
            "adapter": next(iter(paths.values())),
            "card": str(card),
            "loss": recent(self.losses) if self.losses else None,
            "first_loss": self.losses[0] if self.losses else None,
            "steps": self.step,
            "seconds": round(self.seconds, 3),
            "steps_per_second": self.step / self.seconds if self.seconds else 0.0,
            "parameters": sum(parameter.numel() for parameter in self.parameters),
            "triggers": recipe["triggers"],
            "layers": recipe["training"]["layers"],
            **({"snapshots": str(self.folder / SNAPSHOTS)} if self.config.snapshots else {}),
            **({"validation": self.validation} if self.validation else {}),
            **task.result(paths),
            **({"warning": warning} if warning else {}),
        }
