"""What can be done with jobs: submit, look, cancel, resume, run again, delete."""

from __future__ import annotations

import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from adapters import files
from adapters.errors import Cancelled, InputError
from adapters.progress import Monitor
from studio import settings
from studio.jobs import kinds, process, queue, store
from studio.jobs.model import ENDED, Job, ProgressRow
from studio.schema import JobConfig

HERE = "here"
"""The "queue" of jobs that the asking process runs itself."""


def submit(kind: str, config: JobConfig | Mapping[str, Any]) -> str:
    """Put a job in its queue and return its id; raises :class:`InputError` if it is known to fail.

    Nothing works on it until a worker runs (:func:`ensure_worker`).
    """
    parsed = _ready(kind, config)
    job = _new(kind, parsed, queue.name_for(str(getattr(parsed, "device", "auto"))))
    queue.put(job.queue, job.id)
    return job.id


def run_here(kind: str, config: JobConfig | Mapping[str, Any], monitor: Monitor) -> Job:
    """Run a job in this process, recorded like any other, and return it when it has ended.

    Raises:
        adapters.errors.StudioError, or whatever ended the job; ``KeyboardInterrupt`` cancels it.
    """
    job = _new(kind, _ready(kind, config), HERE)
    return work_here(job.id, monitor)


def work_here(job_id: str, monitor: Monitor) -> Job:
    """Run a waiting job in this process (see :func:`run_here`)."""
    from studio.jobs.execute import execute

    store.change(job_id, ["queued"], queue=HERE, **process.identity(), heartbeat=time.time())
    error = execute(job_id, monitor)
    if error is not None:
        raise error
    job = get(job_id)
    if job.status == "cancelled":  # while it waited for its device
        raise Cancelled("Stopped on request.")
    return job


def run_together_here(kind: str, configs: Mapping[str, JobConfig], monitor: Monitor) -> Sequence[Job]:
    """Run jobs of one kind as one in this process, each recorded like any other; returns them when all have ended.

    Args:
        configs: name for messages -> configuration.

    Raises:
        InputError: one is known to fail, or they cannot be together; then none is recorded.
    """
    from studio.jobs.execute import execute_together

    made = _new_together(kind, configs, HERE)
    for job in made:
        store.change(job.id, ["queued"], queue=HERE, **process.identity(), heartbeat=time.time())
    execute_together(made, monitor)
    return [get(job.id) for job in made]


def submit_together(kind: str, configs: Mapping[str, JobConfig]) -> Sequence[str]:
    """Put jobs of one kind in their queue, to run as one, and return their ids; errors as :func:`run_together_here`."""
    first = next(iter(configs.values()))
    made = _new_together(kind, configs, queue.name_for(str(getattr(first, "device", "auto"))))
    for job in made:
        queue.put(job.queue, job.id)
    return [job.id for job in made]


def _new_together(kind: str, configs: Mapping[str, JobConfig], queue_name: str) -> Sequence[Job]:
    found = kinds.find(kind)
    found.check_together(configs)
    ready = [_ready(kind, config) for config in configs.values()]
    made = [_new(kind, config, queue_name) for config in ready]
    store.put_together([job.id for job in made], made[0].id)
    return made


def together(job_ids: Sequence[str]) -> Sequence[Job]:
    """Let waiting jobs run as one, when the first of them has its turn.

    Raises:
        InputError: one is not waiting, or they cannot be together.
    """
    found = {job.id: job for job in map(get, job_ids)}
    for job in found.values():
        if job.status != "queued" or job.queue == HERE:
            raise InputError(f"Job {job.id} is {job.status}: only waiting jobs can be put together.")
    check_together(list(found.values()))
    store.put_together(found, next(iter(found)))
    return list(found.values())


def check_together(found: Sequence[Job]) -> None:
    """Refuse jobs that cannot run as one; raises :class:`InputError`."""
    kind = kinds.find(found[0].kind)
    if other := next((job for job in found if job.kind != kind.name), None):
        raise InputError(f"Jobs of the kinds {kind.name} and {other.kind} run one by one: leave out job {other.id}.")
    kind.check_together({f"Job {job.id}": kind.parse(job.config) for job in found})


def mates(job_id: str) -> Sequence[Job]:
    """The waiting jobs that could run as one with this one, oldest first; none unless it waits itself."""
    job = get(job_id)
    if job.status != "queued" or job.queue == HERE or not kinds.find(job.kind).together:
        return []
    waiting = [other for other in reversed(store.newest(1000, ["queued"], job.kind)) if other.queue == job.queue]
    return [other for other in waiting if other.id != job.id and _fit(job, other)]


def _fit(job: Job, other: Job) -> bool:
    try:
        check_together([job, other])
    except InputError:
        return False
    return True


def packed(job_id: str) -> Sequence[Job]:
    """The jobs that run, or ran, as one with this one, itself among them; empty if it is alone."""
    return store.together(get(job_id).id)


def get(job_id: str) -> Job:
    """One job; the id may be shortened to its unique beginning or end, "last" is the newest.

    Raises:
        InputError: there is no such job, or several.
    """
    mark_interrupted()
    if job_id == "last":
        latest = store.newest(1)
        if not latest:
            raise InputError("There are no jobs yet.")
        return latest[0]
    job = store.read(job_id)
    if job is not None:
        return job
    found = store.matching(job_id) if job_id else []
    if len(found) > 1:
        raise InputError(f"Several jobs match '{job_id}': {', '.join(found)} ...")
    match = store.read(found[0]) if found else None
    if match is None:
        raise InputError(f"There is no job '{job_id}': see  studio jobs list.")
    return match


def newest(limit: int = 50, status: Iterable[str] = (), kind: str | None = None) -> list[Job]:
    """The newest jobs first."""
    mark_interrupted()
    return store.newest(limit, status, kind)


def history(job_id: str, since: int = 0) -> list[ProgressRow]:
    """A job's reports with news (loss, metrics, preview, message, new stage), oldest first.

    ``since`` leaves out that many from the start, so that a page can ask for what is new.
    """
    return store.history(get(job_id).id, since)


def log(job_id: str, tail: int | None = 200) -> str:
    """The last lines of a job's log (all with ``tail=None``); empty before it starts."""
    file = get(job_id).folder / "log.txt"
    if not file.is_file():
        return ""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines if tail is None else lines[max(0, len(lines) - tail) :])


def cancel(job_id: str) -> Job:
    """Ask a job to stop; a second call kills its process. Returns the job as it is then.

    Raises:
        InputError: the job has ended already.
    """
    job = get(job_id)
    if store.change(job.id, ["queued"], status="cancelled", finished=time.time()):
        return get(job.id)
    if store.change(job.id, ["running"], status="cancelling"):
        return get(job.id)
    if job.status == "cancelling":
        _kill(job)
        return get(job.id)
    raise InputError(f"Job {job.id} is {job.status} already.")


def _kill(job: Job) -> None:
    who = store.owner(job.id)
    if who is None or not process.kill(who):
        raise InputError(f"Job {job.id} runs on {job.host}: stop its worker there.")
    store.change(job.id, ["cancelling"], status="cancelled", finished=time.time())
    if store.newest(1, ["queued"]):
        ensure_worker()


def resume(job_id: str) -> str:
    """Queue an ended job again, in its own folder: training goes on from its checkpoint, other kinds start over.

    Returns the id; raises :class:`InputError` when the job is done or still running.
    """
    job = get(job_id)
    where = queue.name_for(job.device)
    if not prepare_resume(job.id, where):
        raise _not_resumable(job)
    queue.put(where, job.id)
    return job.id


def prepare_resume(job_id: str, queue_name: str = HERE) -> bool:
    """Mark an ended job as queued again; returns whether it could be resumed."""
    states = [status for status in ENDED if status != "done"]
    owner = process.identity() if queue_name == HERE else {"host": "", "pid": None, "pid_started": None}
    job = store.read(job_id)
    marked = store.change(
        job_id, states, status="queued", queue=queue_name, resuming=1, started=None, finished=None, error="",
        heartbeat=time.time(), **owner,
    )  # fmt: skip
    if marked:
        store.take_out(job_id)
    if marked and job is not None and job.seconds:
        store.add_earlier(job_id, job.seconds)
    return marked


def resume_here(job_id: str, monitor: Monitor) -> Job:
    """As :func:`resume`, but in this process; returns when the job has ended, or raises its error."""
    job = get(job_id)
    if not prepare_resume(job.id):
        raise _not_resumable(job)
    return work_here(job.id, monitor)


def _not_resumable(job: Job) -> InputError:
    return InputError(f"Job {job.id} is {job.status}: only an interrupted, cancelled or failed job can be resumed.")


def rerun(job_id: str) -> str:
    """Queue a new job with the same configuration and return its id."""
    job = get(job_id)
    return submit(job.kind, job.config)


def delete(job_id: str) -> None:
    """Remove an ended (or waiting) job and its folder; raises :class:`InputError` while it is running."""
    job = get(job_id)
    if job.status in ("running", "cancelling"):
        raise InputError(f"Job {job.id} is running: cancel it first.")
    shutil.rmtree(job.folder, ignore_errors=True)  # first: changing the record needs room on the disk
    store.forget(job.id)


def mark_interrupted() -> None:
    """Mark jobs whose process has died as interrupted, or as cancelled if that was requested.

    If a worker died, another is started for the jobs waiting behind it. On a full disk nothing is marked.
    """
    with suppress(sqlite3.OperationalError):
        _mark_interrupted()


def _mark_interrupted() -> None:
    died = False
    for job in store.newest(1000, ["running", "cancelling", "queued"]):
        who = store.owner(job.id)
        if who is None or process.alive(who) or (job.status == "queued" and job.queue != HERE):
            continue
        last = who["heartbeat"] or time.time()
        store.change(job.id, ["cancelling"], status="cancelled", finished=last)
        store.change(
            job.id, ["running", "queued"], status="interrupted", finished=last,
            error="The process that ran it has died; resume the job to go on.",
        )  # fmt: skip
        died = died or job.queue != HERE
    if died and store.newest(1, ["queued"]):
        ensure_worker()


def ensure_worker() -> None:
    """Start a worker process, if none runs, for every queue with waiting jobs (the default one if nothing waits)."""
    from studio.jobs import worker

    waiting = {job.queue for job in store.newest(1000, ["queued"])} - {HERE}
    for name in sorted(waiting or {queue.DEFAULT}):
        worker.ensure(name)


def clean() -> int:
    """Remove half-written files that killed processes left in job folders; returns how many."""
    busy = {job.folder for job in store.newest(1000, ["running", "cancelling", "queued"])}
    folders = [folder for folder in settings.folder("jobs").iterdir() if folder.is_dir() and folder not in busy]
    return sum(files.remove_leftovers(folder) for folder in folders)


def workers() -> Sequence[Mapping[str, Any]]:
    """The workers that run: queue, host, pid, started."""
    from studio.jobs import worker

    return worker.running()


def trouble() -> Sequence[str]:
    """Why waiting jobs do not start: a sentence for every queue whose worker failed to; usually empty."""
    waiting = {job.queue for job in store.newest(1000, ["queued"])} - {HERE}
    if not waiting:  # and the queue's own package is not needed
        return []
    from studio.jobs import worker

    return [text for name in sorted(waiting) if (text := worker.failed_start(name))]


def _ready(kind: str, config: JobConfig | Mapping[str, Any]) -> JobConfig:
    """The configuration, unless the job is known to fail."""
    found = kinds.find(kind)
    parsed = found.parse(config)
    found.check(parsed)
    return parsed


def _new(kind: str, config: JobConfig, queue_name: str) -> Job:
    now = time.time()
    job_id = f"{datetime.fromtimestamp(now):%y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    place = settings.folder("jobs", job_id)
    config = config.kept_in(place)
    job = Job(
        id=job_id, kind=kind, status="queued", config=config.model_dump(mode="json"), created=now, folder=place,
        device=str(getattr(config, "device", "auto")), queue=queue_name, cwd=Path.cwd(),
    )  # fmt: skip
    files.write_text(place / "config.yaml", config.to_yaml())
    store.insert(job)
    if queue_name == HERE:
        store.change(job_id, ["queued"], heartbeat=now, **process.identity())
    return job
