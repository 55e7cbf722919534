"""What is trained: one Task per kind of training, under either driver.

A task knows its base, its data, its loss and its files; the session keeps the run (methods, checkpoints, records,
saving) and a driver runs the steps. A new kind is one module in :mod:`studio.training.tasks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from adapters.formats import LoraFile
from adapters.formats.coverage import Coverage, trained
from adapters.plugin import Answers, Layers, Outputs, Plugin

if TYPE_CHECKING:
    from studio.training.session import TrainSession

Measures = dict[str, float]

RISE = 10.0
"""A loss that ends this many times above its start is reported."""


class Task:
    """Base of the tasks. Order of calls: rows, open, check, encode, components, inject, trainee; then steps.

    Args:
        asked: the configuration as given, which is recorded, and compared when a run is resumed.

    Attributes:
        config: the configuration the session and the driver read (rank, steps, optimiser, saving).
        session: the run, from :meth:`open` on.
        learner: the module from :meth:`trainee`, prepared by the driver.
        total: optimiser steps of the whole run, after :meth:`encode`.
        data_digest: identity of the data, stored in checkpoints, after :meth:`encode`.
    """

    data_noun: ClassVar[str] = "data"
    """What users call the data, a plural, for messages."""
    measures_at_end: ClassVar[bool] = False
    """Whether the finished adapter is measured if there is data for it."""
    learner_noun: str = "adapter"
    """What learns, for messages."""
    leftovers: ClassVar[tuple[str, ...]] = ("checkpoints",)
    """Files of an earlier run in the folder, deleted when a run starts afresh."""

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
        """Prepare the data; sets ``total`` and ``data_digest``."""
        raise NotImplementedError

    def components(self) -> dict[str, Any]:
        """The frozen models that get an adapter, by component name."""
        raise NotImplementedError

    def earlier(self, models: Mapping[str, Any]) -> LoraFile | None:
        """The adapter to continue from, fitted to the models before the injection."""
        return None

    def inject(self, models: dict[str, Any]) -> dict[str, Any]:
        """Add the adapters; returns the models with them (the same objects, or wrapped)."""
        raise NotImplementedError

    def reach(self) -> dict[str, Coverage]:
        """Component -> which share of its layers learns, after :meth:`inject`."""
        return {name: trained(model) for name, model in self.session.models.items()}

    def trainee(self) -> nn.Module:
        """Everything that learns as one module, with gradient checkpointing and compilation as configured."""
        raise NotImplementedError

    # ---------------------------------------------------------------- steps
    def collate(self, start: int, stop: int) -> Iterator[Any]:
        """Batches ``start`` .. ``stop - 1`` of the run, for this process."""
        raise NotImplementedError

    def loss(self, batch: Any) -> tuple[torch.Tensor, Outputs | Answers]:
        """The loss of one batch, with gradients, and what plugins may see."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called when the forward and backward passes of an optimiser step are done, or failed."""

    def rose(self, first: float, last: float) -> bool:
        """Whether a loss that began at ``first`` and ends at ``last`` means that the run diverged."""
        return last > RISE * first > 0

    @property
    def measurable(self) -> bool:
        """Whether there is held-out data to measure on."""
        return False

    def measure(self) -> Measures:
        """Measures on held-out data, with the current weights."""
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
        """Answer or draw the sample prompts with the current weights; write and report the results."""

    def sample_without(self) -> None:
        """Draw the sample prompts without the adapter, to be seen beside those with it."""

    def rewind(self, step: int) -> None:
        """Called when a run resumes after ``step``: drop from the task's files what it will write again."""

    def before_first(self) -> None:
        """Called before the first step of a fresh run."""

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The recipe's entries on the base (besides its digest) and the data."""
        raise NotImplementedError

    def export(self, layers: Layers, folder: Path, name: str, recipe: dict[str, Any]) -> dict[str, str]:
        """Write the adapter; returns format -> path, the one to use first."""
        raise NotImplementedError

    def trained(self) -> dict[str, Any]:
        """The recipe's entries on the training, besides those of every kind."""
        return {}

    def card(self, recipe: dict[str, Any]) -> Path:
        """Write ``card.md`` into the run's folder: what the adapter is, how it is used, how it was made."""
        raise NotImplementedError

    def result(self, paths: Mapping[str, str]) -> dict[str, Any]:
        """Entries of the result, besides those of every kind."""
        return {}

    def close(self) -> None:
        """Undo changes to the loaded models."""
