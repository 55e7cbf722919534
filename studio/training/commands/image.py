"""``studio train image``: a LoRA of a text-to-image model from pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from studio.cli.output import Json, Output, Quiet
from studio.cli.schema_options import with_options
from studio.jobs.kinds import Kind
from studio.training.commands import launch
from studio.training.commands import run as training_run
from studio.training.schemas.image import TrainImageConfig


def register(group: typer.Typer, kind: Kind) -> None:
    """Add the command to the group ``train``."""
    group.command(kind.train, help=kind.help)(with_options(TrainImageConfig)(image))


def image(
    fields: dict[str, Any],
    config: Annotated[Path | None, typer.Argument(help="Configuration file; flags change what it says.")] = None,
    estimate: training_run.Estimate = False,
    folder: training_run.Folder = None,
    resume: training_run.Resume = False,
    keep: training_run.Keep = False,
    step: training_run.Step = None,
    detach: launch.Detach = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a LoRA of a text-to-image model."""
    chosen = training_run.read(TrainImageConfig, config, fields, folder, resume, keep)
    output = Output(json, quiet)
    if estimate:
        training_run.estimate(chosen, output)
        return
    if not (keep or detach or quiet or folder or _embedded(chosen.base)):
        training_run.announce(chosen, output)
    training_run.begin(chosen, folder, resume, detach, output, training_run.kept(keep, step))


def _embedded(base: str) -> bool:
    import assets
    from studio import library

    return Path(library.resolve_pipeline(base)).is_relative_to(assets.path("models"))
