"""``studio train language``: adapters of language models from rows of text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.errors import InputError
from studio.cli.output import Json, Output, Quiet
from studio.cli.schema_options import with_options
from studio.jobs.kinds import Kind
from studio.library import packaged
from studio.training.commands import launch
from studio.training.commands import run as training_run
from studio.training.schemas.language import TrainLanguageConfig


def register(group: typer.Typer, kind: Kind) -> None:
    """Add the command to the group ``train``."""
    group.command(kind.train, help=kind.help)(with_options(TrainLanguageConfig)(language))


def language(
    fields: dict[str, Any],
    config: Annotated[list[Path] | None, typer.Argument(help="Configuration file; flags change what it says.")] = None,
    jobs: Annotated[
        bool,
        typer.Option(
            "--jobs",
            help="Train the adapters of several configuration files at once: one process, the base in memory "
            "once, a job for each.",
            rich_help_panel="Output",
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only read the data and show what would be learnt.", rich_help_panel="Output"),
    ] = False,
    estimate: training_run.Estimate = False,
    folder: training_run.Folder = None,
    resume: training_run.Resume = False,
    keep: training_run.Keep = False,
    step: training_run.Step = None,
    detach: launch.Detach = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a LoRA of a language model."""
    output = Output(json, quiet)
    if jobs:
        if folder or check or estimate:
            raise InputError("--jobs makes a job of every file: leave out --folder, --check and --estimate.")
        training_run.together(TrainLanguageConfig, config or [], fields, detach, output)
        return
    if config and len(config) > 1:
        raise InputError(f"{len(config)} configuration files: give one, or train their adapters together with --jobs.")
    chosen = training_run.read(TrainLanguageConfig, config[0] if config else None, fields, folder, resume, keep)
    if check:
        _show(chosen, output)
        return
    if estimate:
        training_run.estimate(chosen, output)
        return
    from studio.training.schemas import combinations

    for sentence in combinations.warnings(chosen):
        output.note(sentence)
    if not (keep or detach or quiet or folder or chosen.base in packaged.known()):
        training_run.announce(chosen, output)
    training_run.begin(chosen, folder, resume, detach, output, training_run.kept(keep, step))


def _show(config: TrainLanguageConfig, output: Output) -> None:
    from studio.training.language.check import check_data

    found = check_data(config)
    lengths = found["tokens"]
    text = (
        f"{found['rows']} rows, {found['held_out']} held out; {found['samples']} samples of {lengths['shortest']} to "
        f"{lengths['longest']} tokens (mean {lengths['mean']:.0f}); learnt tokens: {found['learnt']:.0%}\n"
        + (f"{found['remark']}\n" if found["remark"] else "")
        + (f"labels: {', '.join(found['labels'])}\n" if found["labels"] else "")
        + f"\nThe first sample, with learnt parts in [[ ]]:\n{found['example']}"
    )
    output.result(found, text)
