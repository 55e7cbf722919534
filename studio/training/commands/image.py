"""``studio train image``: a LoRA of a text-to-image model from pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from studio.cli.output import Json, Output, Quiet
from studio.cli.schema_options import with_options
from studio.training.commands import launch
from studio.training.commands import run as training_run
from studio.training.schemas.image import TrainImageConfig


def register(group: typer.Typer, text: str) -> None:
    """Add the command to the group ``train``; ``text`` is its help."""
    group.command("image", help=text)(with_options(TrainImageConfig)(image))


def image(
    fields: dict[str, Any],
    config: Annotated[Path | None, typer.Argument(help="Configuration file; flags change what it says.")] = None,
    preset: Annotated[
        str, typer.Option("--preset", help="Starting point (concept, style, captioned; -quick, -normal); "
                          "what is given besides wins.")
    ] = "",
    folder: training_run.Folder = None,
    resume: training_run.Resume = False,
    keep: training_run.Keep = False,
    detach: launch.Detach = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Train a LoRA of a text-to-image model."""

    def complete(values: dict[str, Any]) -> dict[str, Any]:
        from studio.training.presets import with_preset

        return with_preset(preset, values) if preset else values

    chosen = training_run.read(TrainImageConfig, config, fields, folder, resume, complete, keep)
    training_run.begin("studio.training.tasks.image:run", chosen, folder, resume, detach, Output(json, quiet), keep)
