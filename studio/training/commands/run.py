"""Starts a training from a command: as a job here, in the worker, or in a folder for ``accelerate launch``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from adapters.errors import InputError, StudioError
from studio import silence
from studio.cli.output import Output
from studio.schema import JobConfig, read_yaml
from studio.training.commands import launch

C = TypeVar("C", bound=JobConfig)

Folder = Annotated[
    Path | None,
    typer.Option("--folder", help="Folder of the run instead of a job's (for accelerate launch).",
                 rich_help_panel="Output"),
]  # fmt: skip
Resume = Annotated[
    bool, typer.Option("--resume", help="Resume from the last checkpoint in --folder.", rich_help_panel="Output")
]

Estimate = Annotated[bool, typer.Option("--estimate", help="Only estimate memory and time.", rich_help_panel="Output")]

Step = Annotated[
    int | None,
    typer.Option("--step", min=1, metavar="N", help="--keep: the checkpoint of this step instead of the last one.",
                 rich_help_panel="Output"),
]  # fmt: skip

Keep = Annotated[
    bool,
    typer.Option("--keep", help="Do not train: save the last checkpoint in --folder as the adapter.",
                 rich_help_panel="Output"),
]  # fmt: skip


def read(
    schema: type[C],
    config: Path | None,
    fields: dict[str, Any],
    folder: Path | None,
    resume: bool,
    keep: bool = False,
) -> C:
    """The configuration: the file's values, overridden by the flags.

    Raises:
        InputError: values that cannot be trained, or a folder that is missing where one is needed.
    """
    silence.library_warnings()
    if folder is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("Several processes train together: give them one folder with --folder.")
    if resume and folder is None:
        raise InputError("--resume needs --folder; resume a job with  studio jobs resume ID.")
    if keep and folder is None:
        raise InputError(
            "--keep needs --folder, the folder of the run whose checkpoint becomes the adapter; for a job use  "
            "studio jobs keep ID."
        )
    values = {**(read_yaml(config) if config else {}), **fields}
    return schema.parse(values, source=str(config or schema.kind.replace("-", " ")))


def kept(keep: bool, step: int | None) -> bool | int:
    """What to keep: nothing, the last checkpoint (True) or that of a step; raises :class:`InputError`."""
    if step and not keep:
        raise InputError("--step needs --keep: it names the checkpoint that becomes the adapter.")
    return step or keep


def check(config: JobConfig) -> None:
    """Refuse what is known to fail; raises :class:`InputError`."""
    from studio.jobs import kinds

    kinds.find(config.kind).check(config)


def estimate(config: JobConfig, output: Output) -> None:
    """Print an estimate of memory and time, without training."""
    check(config)
    from studio.training import estimate as estimates

    found = estimates.estimated(config)
    output.result(found.as_json(), estimates.sentence(found))


def announce(config: JobConfig, output: Output) -> None:
    """Print an estimate before a real model is loaded."""
    check(config)
    try:
        from studio.training import estimate as estimates

        output.note(estimates.sentence(estimates.estimated(config)))
    except InputError as error:  # the run itself may still be possible
        output.note(str(error))


def begin(
    config: JobConfig, folder: Path | None, resume: bool, detach: bool, output: Output, keep: bool | int = False
) -> None:
    """Train ``config`` and print the result."""
    if not detach:
        silence.loading_bars()
        _tell_alone(output)
    if folder is not None:
        check(config)
        _in_folder(config, folder, resume, keep, output)
    elif detach:
        launch.detach(config.kind, config, output)
    else:
        _as_job(config, output)


def _tell_alone(output: Output) -> None:
    """Warn that ``accelerate launch --cpu --num_processes 2`` silently starts one process."""
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
        from studio.training.device import left_alone

        if left_alone():
            output.note(
                "Several processes were requested, but accelerate launch started only this one (on CPUs it needs MPI), "
                "which trains alone. Start several with  torchrun --nproc_per_node=2 -m studio train ... --folder run"
            )


def _as_job(config: JobConfig, output: Output) -> None:
    from studio import jobs

    job = launch.here(lambda terminal: jobs.run_here(config.kind, config, terminal), output)
    output.result({"job": job.id, **(job.result or {})}, lines(job.result or {}))


def together(schema: type[C], files: Sequence[Path], fields: dict[str, Any], detach: bool, output: Output) -> None:
    """Train what several files describe as one, a job for each, and print the results.

    Raises:
        InputError: files that cannot be together, or one of the trainings failed.
        Cancelled: they were stopped.
    """
    from studio import jobs

    configs = {str(file): read(schema, file, fields, None, False) for file in files}
    if len(configs) < len(files):
        raise InputError("A configuration file is given twice: every adapter needs one of its own.")
    if detach:
        launch.detach_together(schema.kind, configs, output)
        return
    silence.loading_bars()
    made = launch.here_together(lambda terminal: jobs.run_together_here(schema.kind, configs, terminal), output)
    shown = "\n\n".join(lines({"job": job.id, **job.result}) for job in made if job.result)
    output.result([{"job": job.id, "status": job.status, **(job.result or {})} for job in made], shown)
    if failed := [job for job in made if job.status == "failed"]:
        told = "; ".join(f"job {job.id}: {job.error}" for job in failed)
        raise StudioError(f"{len(failed)} of {len(made)} trainings failed ({told})")


def _in_folder(config: JobConfig, folder: Path, resume: bool, keep: bool | int, output: Output) -> None:
    """Without a record in the job store: every process of ``accelerate launch`` calls this."""
    from adapters.errors import Cancelled
    from studio.cli.terminal import Terminal
    from studio.jobs import kinds

    run = kinds.find(config.kind).function()
    folder.mkdir(parents=True, exist_ok=True)
    first = os.environ.get("RANK", "0") == "0"
    with Terminal(output.quiet or not first, on_end=bool) as terminal:
        try:
            result = run(config, folder, terminal, resume=resume, keep=keep)
        except Cancelled:
            raise Cancelled(f"Stopped. Resume with the same command and  --resume --folder {folder}") from None
    if first:
        output.result(result, lines(result))


def lines(result: dict[str, Any]) -> str:
    """The result's plain values, one per line."""
    return "\n".join(f"{name}: {value}" for name, value in result.items() if isinstance(value, (str, int, float)))
