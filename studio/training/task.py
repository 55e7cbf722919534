"""What is trained: one Task per kind of training, under either driver.

A task knows its base, its data, its loss and its files; the session keeps the run (methods, checkpoints, records,
saving) and a driver turns the steps. A new kind is one module in :mod:`studio.training.tasks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from adapters.formats import LoraFile
from adapters.plugin import Answers, Layers, Outputs, Plugin

if TYPE_CHECKING:
    from studio.training.session import TrainSession

Measures = dict[str, float]

RISE = 10.0
"""A loss that ends so many times above where it began is told."""


class Task:
    """Base of the tasks. Order of calls: rows, open, check, encode, components, inject, trainee; then steps.

    Args:
        asked: the configuration as the person gave it: what is recorded, and compared when a run is resumed.

    Attributes:
        config: what the session and the driver read (rank, steps, optimiser, saving).
        session: the run, from :meth:`open` on.
        learner: what :meth:`trainee` gave, as the driver prepared it.
        total: optimiser steps of the whole run, after :meth:`encode`.
        data_digest: what a checkpoint remembers of the data, after :meth:`encode`.
    """

    data_noun: ClassVar[str] = "data"
    """What the person calls the data, a plural, for messages."""
    measures_at_end: ClassVar[bool] = False
    """Whether the finished adapter is measured whenever there is data for it."""
    leftovers: ClassVar[tuple[str, ...]] = ("checkpoints",)
    """What an earlier run leaves in the folder, cleared when a run starts anew."""

    config: Any
    session: TrainSession
    learner: Any
    total: int
    data_digest: str

    def __init__(self, asked: Any) -> None:
        self.asked = self.config = asked

    # ---------------------------------------------------------------- before the first step
    def methods(self) -> list[Plugin]:
        """The training methods that the configuration asks for."""
        from studio.training.methods import plugins_for

        return plugins_for(self.asked)

    def rows(self) -> None:
        """Read the data, before anything large is loaded; raises :class:`adapters.errors.InputError`."""
        raise NotImplementedError

    def open(self, session: TrainSession) -> None:
        """Load the base on the session's device."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse what this base cannot be trained with."""

    def digest(self) -> str:
        """Fingerprint of the base's weights."""
        raise NotImplementedError

    def encode(self) -> None:
        """Make the data ready; sets ``total`` and ``data_digest``."""
        raise NotImplementedError

    def components(self) -> dict[str, Any]:
        """The frozen models that get an adapter, by component name."""
        raise NotImplementedError

    def earlier(self, models: Mapping[str, Any]) -> LoraFile | None:
        """The adapter to continue from, fitted to the models as they are before the injection."""
        return None

    def inject(self, models: dict[str, Any]) -> dict[str, Any]:
        """Add the adapters; returns the models that hold them (the same, or wrapped)."""
        raise NotImplementedError

    def trainee(self) -> nn.Module:
        """Everything that learns as one module, with gradient checkpointing and compilation as configured."""
        raise NotImplementedError

    # ---------------------------------------------------------------- steps
    def collate(self, start: int, stop: int) -> Iterator[Any]:
        """Batches ``start`` .. ``stop - 1`` of the run, for this process."""
        raise NotImplementedError

    def loss(self, batch: Any) -> tuple[torch.Tensor, Outputs | Answers]:
        """The loss of one batch, with gradients, and what plugins may see of it."""
        raise NotImplementedError

    def after_step(self) -> None:
        """The forward and backward passes of an optimiser step are done, or failed."""

    def rose(self, first: float, last: float) -> bool:
        """Whether a loss that began at ``first`` and ends at ``last`` tells of a run that has diverged."""
        return last > RISE * first > 0

    @property
    def measurable(self) -> bool:
        """Whether there is data kept out to measure with."""
        return False

    def measure(self) -> Measures:
        """Measures on the data kept out, with the weights the models hold now."""
        raise NotImplementedError

    def epoch(self, step: int) -> float:
        """Passes over the data after ``step`` optimiser steps."""
        raise NotImplementedError

    # ---------------------------------------------------------------- looking and saving
    @property
    def samples_wanted(self) -> bool:
        """Whether there are prompts to answer or draw."""
        return False

    def sample(self, step: int) -> None:
        """Answer or draw the sample prompts with the weights the models hold now; write and report them."""

    def sample_without(self) -> None:
        """Draw the sample prompts without the adapter, to be seen beside those with it."""

    def rewind(self, step: int) -> None:
        """A resumed run goes on after ``step``: drop from the task's own files what it will write again."""

    def before_first(self) -> None:
        """A fresh run is about to take its first step."""

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the recipe says of the base (besides its digest) and of the data."""
        raise NotImplementedError

    def export(self, layers: Layers, folder: Path, name: str, recipe: dict[str, Any]) -> dict[str, str]:
        """Write the adapter; returns format -> path, the one to use first."""
        raise NotImplementedError

    def trained(self) -> dict[str, Any]:
        """What the recipe says of the training besides what every kind has."""
        return {}

    def card(self, recipe: dict[str, Any]) -> Path:
        """Write ``card.md`` into the run's folder: what the adapter is, how it is used, how it was made."""
        raise NotImplementedError

    def result(self, paths: Mapping[str, str]) -> dict[str, Any]:
        """What the result says besides what every kind has."""
        return {}

    def close(self) -> None:
        """Undo what was done to the loaded models."""
