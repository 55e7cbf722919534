"""Runs a job from a command: here, with its progress in the terminal, or in the worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.errors import Cancelled
from studio.cli.output import Output
from studio.cli.terminal import Terminal

if TYPE_CHECKING:
    from studio.jobs import Job

Detach = Annotated[
    bool,
    typer.Option("--detach", "-d", help="Queue it as a job for the worker and return.", rich_help_panel="Output"),
]


def detach(kind: str, config: Any, output: Output) -> None:
    """Queue the job and say how to follow it."""
    from studio import jobs

    job_id = jobs.submit(kind, config)
    jobs.ensure_worker()
    output.result({"job": job_id, "status": "queued"}, f"Job {job_id} is queued.")
    output.note(f"Follow it with  studio jobs watch {job_id}")


def detach_together(kind: str, configs: Mapping[str, Any], output: Output) -> None:
    """Queue jobs that run as one and say how to follow them."""
    from studio import jobs

    made = jobs.submit_together(kind, configs)
    jobs.ensure_worker()
    output.result([{"job": job_id, "status": "queued"} for job_id in made], f"Jobs {', '.join(made)} are queued.")
    output.note(f"Follow one with  studio jobs watch {made[0]}")


def here_together(start: Callable[[Terminal], Sequence[Job]], output: Output) -> Sequence[Job]:
    """As :func:`here`, for jobs that run as one; one that fails does not end the others.

    Raises:
        adapters.errors.StudioError: they cannot run, or all were stopped.
    """
    from studio.jobs.monitor import STOPPING

    with Terminal(output.quiet, on_end=STOPPING.set) as terminal:
        made = start(terminal)
    stopped = [job.id for job in made if job.status in ("cancelled", "interrupted")]
    if stopped and terminal.cancelled():
        raise Cancelled(f"Stopped. Go on with:  studio jobs resume {' '.join(stopped)}")
    return made


def here(start: Callable[[Terminal], Job], output: Output) -> Job:
    """Run ``start`` with a progress display; a stopped job (also by SIGTERM or SIGUSR1) says how to resume it.

    Raises:
        adapters.errors.StudioError: the job failed, or was stopped.
    """
    from studio import jobs
    from studio.jobs.monitor import STOPPING

    with Terminal(output.quiet, on_end=STOPPING.set) as terminal:
        try:
            return start(terminal)
        except (Cancelled, KeyboardInterrupt):
            mine = [job for job in jobs.list(5) if job.status in ("cancelled", "interrupted")]
            hint = f" Go on with:  studio jobs resume {mine[0].id}" if mine else ""
            raise Cancelled(f"Stopped.{hint}") from None
