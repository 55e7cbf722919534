"""``studio train``: adapters from data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.errors import InputError
from studio import hush
from studio.cli import launch
from studio.cli.output import Json, Output, Quiet
from studio.cli.schema_options import with_options
from studio.schemas.base import read_yaml
from studio.schemas.train_image import TrainImageConfig


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="Train an adapter.", no_args_is_help=True)
    group.callback()(_group)
    group.command("image", help="Train a LoRA of a text-to-image model from a folder of pictures.")(
        with_options(TrainImageConfig)(image)
    )
    app.add_typer(group, name="train")


def _group() -> None:
    """Train an adapter."""


def image(
    fields: dict[str, Any],
    config: Annotated[Path | None, typer.Argument(help="Configuration file; flags change what it says.")] = None,
    preset: Annotated[
        str, typer.Option("--preset", help="Starting point (concept, style, captioned; -quick, -normal); "
                          "what is given besides wins.")
    ] = "",
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Where the run is kept instead of a job's folder (for accelerate launch).",
                     rich_help_panel="Output"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --folder.", rich_help_panel="Output")
    ] = False,
    detach: launch.Detach = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Train a LoRA of a text-to-image model."""
    output = Output(json, quiet)
    hush.remarks()
    if folder is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("Several processes train together: give them one place with --folder.")
    if resume and folder is None:
        raise InputError("--resume goes with --folder; a job goes on with  studio jobs resume ID.")
    values = {**(read_yaml(config) if config else {}), **fields}
    if preset:
        from studio.training.presets import with_preset

        values = with_preset(preset, values)
    chosen = TrainImageConfig.parse(values, source=str(config or "train image"))
    if not detach:
        hush.loading_bars()
    if folder is not None:
        _in_folder(chosen, folder, resume, output)
    elif detach:
        launch.detach("train-image", chosen, output)
    else:
        _as_job(chosen, output)


def _as_job(config: TrainImageConfig, output: Output) -> None:
    from studio import jobs

    job = launch.here(lambda terminal: jobs.run_here("train-image", config, terminal), output)
    output.result({"job": job.id, **(job.result or {})}, _lines(job.result or {}))


def _in_folder(config: TrainImageConfig, folder: Path, resume: bool, output: Output) -> None:
    """Without a record in the job store: every process of ``accelerate launch`` calls this."""
    from adapters.errors import Cancelled
    from studio.cli.terminal import Terminal
    from studio.training.image import run

    folder.mkdir(parents=True, exist_ok=True)
    first = os.environ.get("RANK", "0") == "0"
    with Terminal(output.quiet or not first) as terminal:
        try:
            result = run(config, folder, terminal, resume=resume)
        except Cancelled:
            raise Cancelled(f"Stopped. Go on with the same command and  --resume --folder {folder}") from None
    if first:
        output.result(result, _lines(result))


def _lines(result: dict[str, Any]) -> str:
    """The result's plain values, one a line."""
    return "\n".join(f"{name}: {value}" for name, value in result.items() if isinstance(value, (str, int, float)))
