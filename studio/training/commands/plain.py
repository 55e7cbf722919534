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
        estimate: training_run.Estimate = False,
        folder: training_run.Folder = None,
        resume: training_run.Resume = False,
        keep: training_run.Keep = False,
        step: training_run.Step = None,
        detach: launch.Detach = False,
        json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        chosen, output = training_run.read(schema, config, fields, folder, resume, keep), Output(json, quiet)
        if estimate:
            training_run.estimate(chosen, output)
            return
        if kind.estimate and not (keep or detach or quiet or folder or _embedded(chosen)):
            training_run.announce(chosen, output)
        training_run.begin(chosen, folder, resume, detach, output, training_run.kept(keep, step))

    hidden = () if kind.estimate else ("estimate",)
    group.command(kind.train, help=kind.help)(with_options(schema, without=hidden)(train))


def _embedded(config: Any) -> bool:
    """Whether the base is shipped with the studio, so small that its cost needs no announcement."""
    import assets
    from studio import library

    known = {record.name: record.path for record in library.bases()}
    return known.get(config.base, Path(config.base)).is_relative_to(assets.path("models"))
