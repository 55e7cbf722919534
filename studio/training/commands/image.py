"""``studio train image``: a LoRA of a text-to-image model from pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.errors import InputError
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
    preset: Annotated[
        str, typer.Option("--preset", help="Starting point (concept, style, captioned; -quick, -normal); "
                          "what is given besides wins.")
    ] = "",
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Only show what memory and time it would need.", rich_help_panel="Output"),
    ] = False,
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
    output = Output(json, quiet)
    if estimate:
        _estimate(chosen, output)
        return
    if not (keep or detach or quiet or folder or _embedded(chosen.base)):
        _announce(chosen, output)
    training_run.begin(chosen, folder, resume, detach, output, keep)


def _estimate(config: TrainImageConfig, output: Output) -> None:
    from studio.training import estimate

    found = estimate.estimated(config)
    output.result(found.as_json(), estimate.sentence(found))


def _announce(config: TrainImageConfig, output: Output) -> None:
    """Say before a real model is loaded what it will need."""
    from studio.training import estimate

    try:
        output.note(estimate.sentence(estimate.estimated(config)))
    except InputError as error:  # the run itself may well be possible
        output.note(str(error))


def _embedded(base: str) -> bool:
    import assets
    from studio import library

    return Path(library.resolve_pipeline(base)).is_relative_to(assets.path("models"))
