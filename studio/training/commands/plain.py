"""``studio train NAME`` for kinds that need only their schema's options and the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from studio.cli.output import Json, Output, Quiet
from studio.cli.schema_options import with_options
from studio.jobs.kinds import Kind
from studio.training.commands import launch
from studio.training.commands import run as training_run


def register(group: typer.Typer, kind: Kind) -> None:
    """Add the command of ``kind`` to the group ``train``."""
    schema = kind.model()

    def train(
        fields: dict[str, Any],
        config: Annotated[Path | None, typer.Argument(help="Configuration file; flags change what it says.")] = None,
        folder: training_run.Folder = None,
        resume: training_run.Resume = False,
        keep: training_run.Keep = False,
        step: training_run.Step = None,
        detach: launch.Detach = False,
        json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        chosen = training_run.read(schema, config, fields, folder, resume, keep=keep)
        training_run.begin(chosen, folder, resume, detach, Output(json, quiet), training_run.kept(keep, step))

    group.command(kind.train, help=kind.help)(with_options(schema)(train))
