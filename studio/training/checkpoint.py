"""Checkpoints: everything a run needs to go on as if it had never stopped.

``checkpoints/step-N/`` holds ``adapter.safetensors`` (fp32, as PEFT names it), ``optimizer.pt``, ``ema.pt`` and
``scaler.pt`` where there are such, and ``state.json`` (step, configuration, data set, plugin state). Random numbers
need no state: they are functions of the seed and the step (``studio.datasets.seeds``). ``trainer_state.json`` is there
if transformers' Trainer ran the loop. Checkpoints of language runs from before this format, ``checkpoint-N/`` with
``studio.json``, are read too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from adapters.errors import InputError
from adapters.files import whole
from studio.schema import JobConfig

FREE_GROUPS = frozenset({"Samples and saving"})
FREE_KEYS = frozenset({"preset", "workers", "memory", "cache_folder", "cache_latents", "cache_text"})
BOUND_KEYS = frozenset({"name", "ema", "ema_decay", "validation_split"})
"""Keys of a free group that still belong to the run."""


TRAINER = "trainer_state.json"
OLD_MARK = "studio.json"


@dataclass
class Checkpoint:
    """Everything saved: tensors by component, optimiser and other states, and plain values."""

    step: int
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    config: dict[str, Any]
    data: str
    losses: list[float]
    seconds: float
    plugins: dict[str, Any]
    ema: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    validation: list[dict[str, float]] = field(default_factory=list)
    trainer: str = ""
    """The state of transformers' Trainer as JSON, empty without it."""
    folder: Path | None = None
    """Where it was read from."""


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``folder/step-N`` completely, then delete all but the newest ``keep``."""
    target = folder / f"step-{checkpoint.step:06d}"
    with whole(target) as part:
        part.mkdir()
        save_file(checkpoint.adapter, part / "adapter.safetensors")
        states = {"optimizer": checkpoint.optimizer, "ema": checkpoint.ema, "scaler": checkpoint.scaler}
        states["plugins"] = checkpoint.plugins
        for name, state in states.items():
            if state:
                torch.save(state, part / f"{name}.pt")
        plain = {
            "step": checkpoint.step,
            "data": checkpoint.data,
            "losses": checkpoint.losses,
            "seconds": checkpoint.seconds,
            "validation": checkpoint.validation,
            "config": checkpoint.config,
        }
        if checkpoint.trainer:
            (part / TRAINER).write_text(checkpoint.trainer, encoding="utf-8")
        (part / "state.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")
    for old in existing(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def existing(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if (path / "state.json").is_file()]
    found += [path for path in folder.glob("checkpoint-*") if (path / OLD_MARK).is_file()]
    return sorted(found, key=step_of)


def step_of(place: Path) -> int:
    """The step of a checkpoint by its name."""
    return int(place.name.rsplit("-", 1)[1])


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        InputError: it is damaged.
    """
    try:
        old = (path / OLD_MARK).is_file()
        plain = json.loads((path / (OLD_MARK if old else "state.json")).read_text(encoding="utf-8"))
        states = {name: _state(path / f"{name}.pt") for name in ("optimizer", "ema", "scaler", "plugins")}
        if old:
            kept = _state(path / "studio_state.pt") or {}
            states["plugins"] = kept["plugins"]
            adapter = {f"model.{name}": value for name, value in kept["parameters"].items()}
        else:
            adapter = load_file(path / "adapter.safetensors")
        trainer = path / TRAINER
        return Checkpoint(
            step=plain["step"],
            adapter=adapter,
            optimizer=states["optimizer"] or {},
            config=plain["config"],
            data=plain["data"],
            losses=plain["losses"],
            seconds=plain["seconds"],
            plugins=states["plugins"] or {},
            ema=states["ema"],
            scaler=states["scaler"],
            validation=plain.get("validation", []),
            trainer=trainer.read_text(encoding="utf-8") if trainer.is_file() else "",
            folder=path,
        )
    except Exception as error:
        raise InputError(
            f"The checkpoint '{path}' is damaged ({error}): delete it and resume from an older one."
        ) from None


def _state(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return found


def take_parameters(own: Mapping[str, torch.nn.Parameter], saved: Mapping[str, torch.Tensor]) -> None:
    """Load saved values into the parameters of a run.

    Raises:
        InputError: the names differ.
    """
    if strange := sorted(own.keys() ^ saved.keys()):
        raise InputError(
            f"The checkpoint's parameters are not those this run trains ({len(strange)} differ, e.g. "
            f"'{strange[0]}'): start a new run."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def check_same_run(saved: Checkpoint, config: JobConfig, data: str, noun: str) -> None:
    """Refuse to resume a run with another configuration or other data; output settings may change.

    Args:
        noun: what users call the data (a plural).

    Raises:
        InputError: naming the keys that differ.
    """
    now = config.model_dump(mode="json")
    then = {**type(config).defaults(), **saved.config}  # a key that came later was at its default
    differing = [key for key in now if now[key] != then.get(key) and not _free(config, key)]
    if differing:
        shown = "; ".join(f"{key}: {then.get(key)!r} -> {now[key]!r}" for key in differing)
        raise InputError(f"This run was started with other settings ({shown}): set those back, or start a new run.")
    if saved.data != data:
        raise InputError(f"The {noun} have changed since this run was started: start a new run.")


def _free(config: JobConfig, key: str) -> bool:
    extra = type(config).model_fields[key].json_schema_extra
    group = extra.get("group") if isinstance(extra, dict) else None
    return key not in BOUND_KEYS and (key in FREE_KEYS or group in FREE_GROUPS)
