"""``studio jobs``: list, watch, cancel, resume, run again, delete."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any

import typer

from studio.cli.output import Json, Output, Quiet, duration, facts, moment, table
from studio.jobs.model import STATUSES, Job, ProgressRow

Id = Annotated[str, typer.Argument(metavar="JOB", help="Id, its unique beginning or end, or 'last'.")]
Ids = Annotated[list[str], typer.Argument(metavar="JOB...", help="Ids, or 'last'.")]

group = typer.Typer(help="Jobs: list, watch, cancel, resume, run again, delete.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(group, name="jobs")


@group.command("list")
def list_(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, newest first.")] = 20,
    status: Annotated[
        list[str] | None, typer.Option("--status", metavar="|".join(STATUSES), help="Only this status; repeatable.")
    ] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Only this kind (compose, train-image ...).")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the newest jobs.

    Example:  studio jobs list --status failed
    """
    from adapters.errors import InputError, nearest
    from studio import jobs

    for word in status or []:
        if word not in STATUSES:
            raise InputError(f"There is no status '{word}'{nearest(word, STATUSES)}: {', '.join(STATUSES)}.")
    found = jobs.list(limit, status or (), kind)
    output = Output(json, quiet)
    for text in jobs.trouble():
        output.note(text)
    if not found:
        output.note("No jobs yet: studio compose and studio train make some.")
    output.result(
        [job.as_json() for job in found],
        lambda: (
            found
            and table(
                ["job", "kind", "status", "progress", "created", "took", ""],
                [
                    (j.id, j.kind, j.status, _progress(j), moment(j.created), duration(j.seconds), j.error)
                    for j in found
                ],
            )
        ),
    )


@group.command()
def show(job: Id, json: Json = False, quiet: Quiet = False) -> None:
    """Show everything about one job."""
    from studio import jobs

    found = jobs.get(job)
    output = Output(json, quiet)
    for text in jobs.trouble() if found.status == "queued" else ():
        output.note(text)
    output.result(found.as_json(), lambda: _facts(found))


@group.command()
def watch(
    job: Id,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Follow a job until it ends (Ctrl-C stops watching, not the job).

    Example:  studio jobs watch last
    """
    from adapters.errors import StudioError
    from studio import jobs

    found = jobs.get(job)
    seen = 0
    last: ProgressRow | None = None
    from studio.cli.terminal import Terminal

    output = Output(json, quiet)
    with Terminal(quiet, stopping="") as terminal:
        while True:
            for row in jobs.history(found.id, seen):
                seen += 1
                terminal.report(row.as_progress())
            found = jobs.get(found.id)
            if found.progress is not None and found.progress != last:
                last = found.progress
                terminal.report(last.as_progress(quiet=True))
            if not found.active or terminal.cancelled():
                break
            if found.status == "queued" and (trouble := jobs.trouble()):
                raise StudioError(" ".join(trouble))
            time.sleep(0.3)
    output.result(found.as_json(), f"Job {found.id} is {found.status}." + (f" {found.error}" if found.error else ""))
    if found.status == "failed":
        raise typer.Exit(1)


@group.command()
def log(
    job: Id,
    tail: Annotated[int, typer.Option("--tail", "-n", min=0, help="Last lines only; 0 = all.")] = 200,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print a job's log."""
    from studio import jobs

    text = jobs.log(job, tail or None)
    Output(json, quiet).result({"log": text}, text)


@group.command()
def cancel(ids: Ids, json: Json = False, quiet: Quiet = False) -> None:
    """Ask jobs to stop; cancelling a job again kills its process."""
    from studio import jobs

    changed = [jobs.cancel(job) for job in ids]
    _say(changed, Output(json, quiet))


@group.command()
def resume(
    ids: Ids,
    here: Annotated[bool, typer.Option("--here", help="Run it in this terminal instead of the worker.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Resume interrupted, cancelled or failed jobs: training from its checkpoint, others from the start.

    Example:  studio jobs resume last
    """
    from studio import jobs
    from studio.training.commands import launch

    output = Output(json, quiet)
    if here:
        changed = [launch.here(partial(jobs.resume_here, job), output) for job in ids]
    else:
        changed = [jobs.get(jobs.resume(job)) for job in ids]
        jobs.ensure_worker()
    _say(changed, output)


@group.command()
def together(ids: Ids, json: Json = False, quiet: Quiet = False) -> None:
    """Train waiting jobs of one base as one: the base is in memory once, each job keeps its own adapter and record.

    Example:  studio jobs together 4f2a 91c0
    """
    from studio import jobs

    changed = list(jobs.together(ids))
    jobs.ensure_worker()
    _say(changed, Output(json, quiet))


@group.command()
def keep(
    job: Id,
    step: Annotated[
        int | None, typer.Option("--step", min=1, metavar="N", help="Step at which it was saved (default: the last).")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Name in the library.")] = "",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add a training's adapter to the library, from any step at which it was saved.

    Example:  studio jobs keep last --step 200
    """
    from studio import jobs
    from studio.training import saved

    found = jobs.get(job)
    record = saved.keep(found, step, name)
    steps, output = list(saved.steps(found)), Output(json, quiet)
    output.result({"library": record.name, "steps": steps}, f"It is in the library as '{record.name}'.")
    output.note(f"Job {found.id} has adapters of the steps {', '.join(map(str, steps))}.")


@group.command()
def rerun(ids: Ids, json: Json = False, quiet: Quiet = False) -> None:
    """Queue new jobs with the same configuration."""
    from studio import jobs

    changed = [jobs.get(jobs.rerun(job)) for job in ids]
    jobs.ensure_worker()
    _say(changed, Output(json, quiet))


@group.command()
def delete(ids: Ids, json: Json = False, quiet: Quiet = False) -> None:
    """Delete jobs with everything in their folders."""
    from studio import jobs

    found = [jobs.get(job) for job in ids]
    for job in found:
        jobs.delete(job.id)
    Output(json, quiet).result({"deleted": [job.id for job in found]}, f"Deleted {len(found)} job(s).")


def _say(changed: list[Job], output: Output) -> None:
    output.result(
        [{"job": job.id, "status": job.status} for job in changed],
        "\n".join(f"Job {job.id} is {job.status}." for job in changed),
    )


def _progress(job: Job) -> str:
    row = job.progress
    if row is None:
        return ""
    count = f" {row.step}/{row.total}" if row.total else ""
    return f"{row.stage}{count}" + (f" loss {row.loss:.4f}" if row.loss is not None else "")


def _together(job: Job) -> str:
    """The jobs that run as one with it."""
    from studio import jobs

    return ", ".join(other.id for other in jobs.packed(job.id) if other.id != job.id)


def _facts(job: Job) -> Any:
    import yaml

    return facts(
        [
            ("job", job.id), ("kind", job.kind), ("status", job.status), ("error", job.error),
            ("progress", _progress(job)), ("together", _together(job)), ("device", job.device),
            ("created", moment(job.created)),
            ("started", moment(job.started)), ("finished", moment(job.finished)), ("took", duration(job.seconds)),
            ("folder", job.folder), ("configuration", yaml.safe_dump(job.config, sort_keys=False, allow_unicode=True)),
            ("result", yaml.safe_dump(job.result, sort_keys=False, allow_unicode=True) if job.result else ""),
        ]
    )  # fmt: skip
