"""Records the teacher's trajectories, and makes batches from them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.errors import InputError
from adapters.progress import Monitor, Progress, check
from pipelines.diffusion.distillation import trajectories
from pipelines.diffusion.distillation.consistency import Path as SamplingPath
from pipelines.diffusion.distillation.trajectories import PART, Facts, Recording
from pipelines.diffusion.families.base import stacked
from studio.datasets.buckets import Size, place
from studio.datasets.cache import Tensors, key_of
from studio.datasets.seeds import normal, rng, uniform
from studio.training.families import Family
from studio.training.teacher import Teacher


@dataclass(frozen=True)
class RecordedBatch:
    """States of trajectories.

    Attributes:
        states, targets: (batch, channels, h, w), fp32.
        knots: which knot (batch,), counted as :meth:`Path.start` does.
        guidance: w (batch,).
        given: conditioning of the prompts.
        numbers: number of every sample in the run.
    """

    states: torch.Tensor
    targets: torch.Tensor
    knots: torch.Tensor
    guidance: torch.Tensor
    given: Tensors
    numbers: list[int]


class Conditions:
    """Conditioning of prompts and one picture size, encoded once."""

    def __init__(self, family: Family, size: Size) -> None:
        self.family = family
        self._size = family.size_condition(size, place(size, size))
        self._known: dict[str, Tensors] = {}

    def __call__(self, prompts: Sequence[str]) -> Tensors:
        """Conditioning of a batch of prompts."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._known:
                encoded = self.family.condition([prompt])
                self._known[prompt] = {name: value[0].detach().cpu() for name, value in encoded.items()} | self._size
        found = [self._known[prompt] for prompt in prompts]
        return {name: stacked([value[name] for value in found]) for name in found[0]}


def record(
    folder: Path,
    facts: Facts,
    count: int,
    prompts: Sequence[str],
    teacher: Teacher,
    path: SamplingPath,
    conditions: Conditions,
    device: torch.device,
    dtype: torch.dtype,
    autocast: Any,
    monitor: Monitor,
) -> None:
    """Record the trajectories that ``folder`` does not hold yet; trajectory i always has prompt i and noise i.

    Args:
        facts: what all parts must agree on (checked before, see :func:`prepare_folder`).
        autocast: makes the context of mixed precision.

    Raises:
        Cancelled: asked to stop; finished parts are kept.
    """
    low, high = facts.guidance
    for part in range(-(-count // PART)):
        if trajectories.part_file(folder, part).is_file():
            continue
        check(monitor)
        numbers = list(range(part * PART, (part + 1) * PART))
        texts = [prompts[number % len(prompts)] for number in numbers]
        w = low + (high - low) * uniform(facts.seed, "trajectory-guidance", numbers)
        given = {name: value.to(device) for name, value in conditions(texts).items()}
        start = normal(facts.seed, "trajectory", numbers, facts.shape).to(device)

        def predict(states: torch.Tensor, levels: torch.Tensor, given: Tensors = given, w: Any = w) -> torch.Tensor:
            check(monitor)
            with autocast():
                return teacher(states.to(dtype), levels, given, w)

        states, targets = trajectories.follow(path, start, predict)
        trajectories.write_part(folder, part, states, targets, w, texts, facts)
        done = min(count, (part + 1) * PART)
        monitor.report(Progress("recording trajectories", done, count))


def prepare_folder(folder: Path, facts: Facts, own: bool) -> None:
    """Check that the trajectories in ``folder`` can be used.

    Args:
        own: it belongs to the run alone, so trajectories that do not fit are deleted.

    Raises:
        InputError: trajectories of another base, guidance, size ...; names what differs.
    """
    for file in sorted(folder.glob("part-*.safetensors")):
        differing = trajectories.check_part(file, facts)
        if not differing:
            continue
        if own:
            shutil.rmtree(folder)
            return
        shown = "; ".join(f"{key}: {old} recorded, {new} wanted" for key, (old, new) in differing.items())
        raise InputError(f"The trajectories in '{folder}' do not fit this run ({shown}): choose another folder.")


class RecordedSupply:
    """Batches of single states, drawn at random from all trajectories.

    Args:
        recording: the trajectories.
        conditions: encodes their prompts.
        batch_size: states per batch and process.
        seed, processes, rank: of the run.
    """

    needs_vae = False
    needs_text_encoders = False

    def __init__(
        self,
        recording: Recording,
        conditions: Conditions,
        batch_size: int,
        seed: int,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        self.recording, self.conditions = recording, conditions
        self.batch_size, self.seed = batch_size, seed
        self._width, self._first = batch_size * processes, batch_size * rank
        conditions(recording.prompts)  # while the text encoders are at hand

    @property
    def epoch_length(self) -> float:
        """A batch of states; all of them are shown."""
        return max(1.0, len(self.recording) / self._width)

    def stream(self, start: int, stop: int) -> Iterator[RecordedBatch]:
        """Batches ``start`` .. ``stop - 1``."""
        for number in range(start, stop):
            first = number * self._width + self._first
            yield self.batch(list(range(first, first + self.batch_size)))

    def batch(self, numbers: list[int]) -> RecordedBatch:
        """The batch of these sample numbers."""
        held, last = self.recording, self.recording.states.shape[1] - 1
        places = [held.place(rng(self.seed, "state", number).randrange(len(held))) for number in numbers]
        rows, columns = (torch.tensor(values) for values in zip(*places, strict=True))
        return RecordedBatch(
            held.states[rows, columns].float(),
            held.targets[rows, columns].float(),
            last - columns,
            held.guidance[rows],
            self.conditions([held.prompts[row] for row in rows.tolist()]),
            numbers,
        )


def digest(facts: Facts, count: int) -> str:
    """The identity of a run's trajectories, stored in its checkpoints."""
    return key_of(sorted(asdict(facts).items()), count)
