"""The device of a run and accelerate's shared state, also for several runs in one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from studio.training.schemas.base import TrainConfig


def processes() -> int:
    """How many processes train together: more than one under ``accelerate launch`` or torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def left_alone() -> bool:
    """Whether ``accelerate launch`` was asked for several processes but started only this one, as it does on a CPU.

    It then still sets the address for the others to meet, but neither it nor MPI sets their number.
    """
    told = os.environ.keys()
    several = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= told
    return several and not {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & told


def launched() -> bool:
    """Whether a launcher started several processes."""
    return processes() > 1


def main_process() -> bool:
    """Whether this is the main process, which writes."""
    return os.environ.get("RANK", "0") == "0"


def own_device(device: str) -> str:
    """``device`` (a resolved name), or this process's own under a launcher."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local is not None and device.startswith("cuda") else device


@contextmanager
def fresh_state(device: str) -> Iterator[None]:
    """Clear accelerate's shared state of an earlier run; an accelerator made inside uses ``device``.

    Under a launcher the launcher decides the devices.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=not launched())
    GradientState._reset_state()
    if launched():
        yield
        return
    PartialState._reset_state()
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    try:
        yield
    finally:
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)


def make_accelerator(config: TrainConfig, dtype: torch.dtype, device: str, folder: Path) -> Any:
    """Accelerate's ``Accelerator`` for this run, on ``device`` unless a launcher decides."""
    from accelerate import Accelerator

    precision = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    with fresh_state(device):
        return Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=config.gradient_accumulation,
            log_with=None if config.tracker == "none" else config.tracker,
            project_dir=str(folder / "logs"),
            cpu=device == "cpu",
        )
