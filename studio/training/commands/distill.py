"""``studio train distill``: guidance, or most of the steps, become part of a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from studio.cli.output import Json, Output, Quiet
from studio.cli.schema_options import with_options
from studio.training.commands import launch
from studio.training.commands import run as training_run
from studio.training.schemas.distill import DistillConfig


def register(group: typer.Typer, text: str) -> None:
    """Add the command to the group ``train``; ``text`` is its help."""
    group.command("distill", help=text)(with_options(DistillConfig)(distill))


def distill(
    fields: dict[str, Any],
    config: Annotated[Path | None, typer.Argument(help="Configuration file; flags change what it says.")] = None,
    folder: training_run.Folder = None,
    resume: training_run.Resume = False,
    keep: training_run.Keep = False,
    detach: launch.Detach = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Distil guidance or few-step sampling into a LoRA."""
    chosen = training_run.read(DistillConfig, config, fields, folder, resume, keep=keep)
    training_run.begin(
        "studio.training.tasks.distillation:run", chosen, folder, resume, detach, Output(json, quiet), keep
    )
