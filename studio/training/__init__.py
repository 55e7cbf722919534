"""Training: the image LoRA trainer, its plugin protocol and presets.

``train_image(data="photos", trigger="zxq", folder="run")`` is the whole job in one call.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from adapters.progress import Monitor

if TYPE_CHECKING:
    from studio.training.schemas.distill import DistillConfig
    from studio.training.schemas.image import TrainImageConfig


def train_image(
    config: TrainImageConfig | None = None,
    *,
    folder: str | os.PathLike[str],
    monitor: Monitor | None = None,
    resume: bool = False,
    **values: Any,
) -> dict[str, Any]:
    """Train an image LoRA and return its result (see :func:`studio.training.tasks.image.run`).

    Args:
        config: the whole configuration; or leave it out and give ``values``.
        folder: the run's folder.

    Raises:
        InputError: both ``config`` and ``values``, or a value that cannot be used.
    """
    from pathlib import Path

    from adapters.errors import InputError
    from adapters.progress import Silent
    from studio.training import ready
    from studio.training.schemas.image import TrainImageConfig
    from studio.training.tasks.image import run

    if config is not None and values:
        raise InputError("Give train_image either a config or single values, not both.")
    if config is None:
        config = TrainImageConfig.parse(values)
    ready.image(config)
    return run(config, Path(folder), monitor or Silent(), resume)


def distill(
    config: DistillConfig | None = None,
    *,
    folder: str | os.PathLike[str],
    monitor: Monitor | None = None,
    resume: bool = False,
    **values: Any,
) -> dict[str, Any]:
    """Distil guidance, or sampling in few steps, into a LoRA; the result is that of
    :func:`studio.training.tasks.distillation.run`.

    Args:
        config: the whole configuration; or leave it out and give ``values``.
        folder: the run's folder.

    Raises:
        InputError: both ``config`` and ``values``, or a value that cannot be used.
    """
    from pathlib import Path

    from adapters.errors import InputError
    from adapters.progress import Silent
    from studio.training import ready
    from studio.training.schemas.distill import DistillConfig
    from studio.training.tasks.distillation import run

    if config is not None and values:
        raise InputError("Give distill either a config or single values, not both.")
    config = config or DistillConfig.parse(values)
    ready.distill(config)
    return run(config, Path(folder), monitor or Silent(), resume)


__all__ = ["distill", "train_image"]
