"""Recorded trajectories: the states of a guided teacher's sampling, and its predictions there.

Noisy pictures of a data set differ from the states met when sampling with guidance, and need a data set. Instead, whole
sampling paths between the knots of a :class:`~pipelines.diffusion.distillation.consistency.Path` are recorded once for
any number of runs. A folder holds files ``part-00000.safetensors`` of some trajectories each:

    states   (n, knots, channels, h, w) fp16    z at every knot, noisiest first
    targets  (n, knots, channels, h, w) fp16    the guided prediction there
    guidance (n,) fp32                          w of each trajectory

and in the header, as JSON, ``facts`` (on teacher and path; the same in all parts of a folder) and ``prompts``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from adapters.errors import InputError
from adapters.formats.tensors import read_tensors, write_tensors
from pipelines.diffusion.distillation.consistency import Path

PART = 16
"""Trajectories per file."""

Predict = Callable[[Tensor, Tensor], Tensor]
"""(states (n, ...), levels (n,)) -> the teacher's guided prediction."""


@dataclass(frozen=True)
class Facts:
    """What trajectories depend on; another run can use them only if all of it is the same."""

    base: str
    prediction_type: str
    knots: int
    shape: tuple[int, ...]
    guidance: tuple[float, float]
    null_prompt: str
    rescale: float
    interval: tuple[float, float]
    styles: tuple[str, ...]
    prompts: str
    seed: int

    def differences(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Field -> (recorded value, wanted value), for fields that differ."""
        mine = json.loads(json.dumps(asdict(self)))
        return {key: (other.get(key), value) for key, value in mine.items() if other.get(key) != value}


def part_file(folder: FilePath, number: int) -> FilePath:
    """The file of part ``number`` (from 0)."""
    return folder / f"part-{number:05d}.safetensors"


def follow(path: Path, start: Tensor, predict: Predict) -> tuple[Tensor, Tensor]:
    """Sample from noise ``start`` (n, ...) down all knots: states and predictions (n, knots, ...), noisiest first."""
    state, states, targets = start, [], []
    for level in path.start().flip(0):
        levels = level.to(start.device).expand(len(start))
        prediction = predict(state, levels)
        states.append(state)
        targets.append(prediction)
        state = path.step(state, prediction, levels, path.end(levels))
    return torch.stack(states, 1), torch.stack(targets, 1)


def write_part(
    folder: FilePath,
    number: int,
    states: Tensor,
    targets: Tensor,
    guidance: Tensor,
    prompts: Sequence[str],
    facts: Facts,
) -> None:
    """Write one part.

    Raises:
        InputError: a value does not fit into fp16 (the message names the knot), or the disk is full.
    """
    tensors = {"states": states.half(), "targets": targets.half(), "guidance": guidance.float()}
    for name in ("states", "targets"):
        finite = torch.isfinite(tensors[name]).flatten(2).all(2).all(0)
        if not bool(finite.all()):
            raise InputError(
                f"The teacher's {name} are not finite at knot {int((~finite).nonzero()[0])} of {len(finite)} (noisiest "
                "first): lower the guidance, or compute in bf16 or fp32."
            )
    text = {"facts": json.dumps(asdict(facts)), "prompts": json.dumps(list(prompts))}
    write_tensors(part_file(folder, number), tensors, text)


def check_part(file: FilePath, facts: Facts) -> dict[str, tuple[Any, Any]]:
    """How the facts of a written part differ from ``facts``; empty = usable.

    Raises:
        InputError: the file is damaged or has no trajectories.
    """
    _, text = read_tensors(file)
    try:
        return facts.differences(json.loads(text["facts"]))
    except (KeyError, json.JSONDecodeError):
        raise InputError(f"'{file}' contains no recorded trajectories: choose another folder.") from None


@dataclass(frozen=True)
class Recording:
    """Trajectories of a folder in memory; shapes as in the files."""

    states: Tensor
    targets: Tensor
    guidance: Tensor
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        """Number of states."""
        return self.states.shape[0] * self.states.shape[1]

    def place(self, number: int) -> tuple[int, int]:
        """(trajectory, knot; the noisiest is 0) of state ``number``."""
        return divmod(number, self.states.shape[1])


def read_recording(folder: FilePath, count: int) -> Recording:
    """The first ``count`` trajectories of ``folder`` (their facts were checked before).

    Raises:
        InputError: a part is damaged or missing.
    """
    parts = [read_tensors(part_file(folder, number)) for number in range(-(-count // PART))]
    joined = {name: torch.cat([tensors[name] for tensors, _ in parts])[:count] for name in parts[0][0]}
    prompts = [prompt for _, text in parts for prompt in json.loads(text["prompts"])][:count]
    return Recording(joined["states"], joined["targets"], joined["guidance"], tuple(prompts))
