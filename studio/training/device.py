"""One accelerator per run, also when several runs follow each other in one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from studio.training.schemas.image import TrainImageConfig


def make_accelerator(config: TrainImageConfig, dtype: torch.dtype, device: str, folder: Path) -> Any:
    """Accelerate's ``Accelerator`` for this run.

    Under ``accelerate launch`` the launcher decides the devices; otherwise ``device`` (a resolved name) is used and
    what an earlier run in this process left in accelerate's shared state is forgotten.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    precision = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    AcceleratorState._reset_state(reset_partial_state=not launched)
    GradientState._reset_state()
    options: dict[str, Any] = {"cpu": device == "cpu"}
    if not launched:
        PartialState._reset_state()
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            os.environ["ACCELERATE_TORCH_DEVICE"] = device
    try:
        return Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=config.gradient_accumulation,
            log_with=None if config.tracker == "none" else config.tracker,
            project_dir=str(folder / "logs"),
            **options,
        )
    finally:
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
