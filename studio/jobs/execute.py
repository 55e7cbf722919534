"""Runs one job, in a worker or in the process of the command that asks for it."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from adapters import files
from adapters.errors import Cancelled
from adapters.progress import Monitor
from studio import devices, error_sentences
from studio.jobs import kinds, process, store
from studio.jobs.model import Job, Status
from studio.jobs.monitor import STOPPING, JobMonitor, Several

logger = logging.getLogger("studio.jobs")

BEAT_SECONDS = 5.0


class _NotMine(Exception):
    """The job was cancelled or taken by another process before it could start."""


def execute(job_id: str, also: Monitor | None = None) -> BaseException | None:
    """Run a queued job: returns None when it is done (or was not ours to run), else the error that ended it.

    Takes the job's device for itself first. The outcome is written to the store; nothing is raised.
    """
    job = store.read(job_id)
    if job is None or job.status != "queued":
        return None
    if len(mates := [mate for mate in store.together(job_id) if mate.status == "queued"]) > 1:
        execute_together(mates, also)
        return None
    try:
        with devices.exclusive(devices.resolve(job.device), lambda: _still_queued(job_id, also)):
            return _claimed(job, also)
    except _NotMine:
        return None


def execute_together(found: Sequence[Job], also: Monitor | None = None) -> None:
    """Run queued jobs of one kind and device as one, each recorded as if it were alone; nothing is raised."""
    kind, several = kinds.find(found[0].kind), None if also is None else Several(also)

    def waits(job: Job) -> bool:
        try:
            _still_queued(job.id, also)
        except _NotMine:
            return False
        return True

    def waiting() -> None:
        if not sum(map(waits, found)):
            raise _NotMine

    def work(job: Job) -> Callable[[Any], BaseException | None]:
        listener = None if several is None else several.part(str(job.config.get("name") or job.id))
        return lambda member: _claimed(job, listener, member)

    with suppress(_NotMine), devices.exclusive(devices.resolve(found[0].device), waiting), _listening():
        kind.run_together([work(job) for job in found])


def _still_queued(job_id: str, also: Monitor | None) -> None:
    job = store.read(job_id)
    if job is None or job.status != "queued" or STOPPING.is_set():
        raise _NotMine
    if also is not None and also.cancelled():
        store.change(job_id, ["queued"], status="cancelled", finished=time.time())
        raise _NotMine


def _claimed(job: Job, also: Monitor | None, member: Any = None) -> BaseException | None:
    """Run the job if it still waits; ``member`` is its share of what it has in common with other jobs."""
    if not store.change(
        job.id, ["queued"], status="running", started=time.time(), finished=None, error="", result=None,
        heartbeat=time.time(), **process.identity(),
    ):  # fmt: skip
        return None
    files.remove_leftovers(job.folder)  # of a process that was killed while writing
    with _log_file(job.folder / "log.txt", own_thread=member is not None), _beating(job.id):
        try:
            logger.info("%s job %s %s", job.kind, job.id, "resumes" if job.resuming else "starts")
            result = _run(job, also, {} if member is None else {"member": member})
            files.write_text(job.folder / "result.json", json.dumps(result, indent=1, default=str))
        except BaseException as error:
            _ended(job, error)
            return error
        logger.info("done")
    _finish(job.id, "done", result=json.dumps(result, default=str))
    return None


def _run(job: Job, also: Monitor | None, shared: dict[str, Any]) -> dict[str, Any]:
    kind = kinds.find(job.kind)
    config = kind.parse(job.config)
    if not kind.keeps_pipeline:
        release_pipeline()
    function = kind.function()
    monitor = JobMonitor(job.id, job.folder, also)
    options = ({"resume": job.resuming} if kind.continues else {}) | shared
    with _inside(job.cwd):
        return kind.finish(config, function(config, job.folder, monitor, **options))


@contextmanager
def _inside(place: Path) -> Iterator[None]:
    """Work in the folder from which the job was submitted, if it still exists."""
    before = Path.cwd()
    if place.is_dir():
        os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def release_pipeline() -> None:
    """Free the pipeline that compositions keep loaded, if there is one."""
    loaded = sys.modules.get("studio.composition.pipeline_cache")
    if loaded is not None:
        loaded.release()


def _ended(job: Job, error: BaseException) -> None:
    asked = store.read(job.id)
    cancelling = asked is not None and asked.status == "cancelling"
    if isinstance(error, (Cancelled, KeyboardInterrupt, SystemExit)):
        stopped_with_process = STOPPING.is_set() and not cancelling
        logger.info("stopped on request")
        if stopped_with_process:
            _finish(job.id, "interrupted", error="The process was stopped; resume the job to go on.")
        else:
            _finish(job.id, "cancelled")
        return
    text = error_sentences.sentence(error)
    if error_sentences.expected(error):
        logger.error("%s", text)
    else:
        logger.error("%s", text, exc_info=error)
    _finish(job.id, "failed", error=text if error_sentences.expected(error) else f"{text} (details in the job's log)")


def _finish(job_id: str, status: Status, **values: Any) -> None:
    try:
        store.change(job_id, ["running", "cancelling"], status=status, finished=time.time(), **values)
    except sqlite3.OperationalError as error:  # it is marked as interrupted when this process has ended
        logger.error("%s", error_sentences.sentence(error))


@contextmanager
def _beating(job_id: str) -> Iterator[None]:
    """Send heartbeats meanwhile, for machines that cannot see our processes."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with suppress(sqlite3.OperationalError):  # a full disk; the job itself says so
                store.beat(job_id)

    threading.Thread(target=beat, name="job heartbeat", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@contextmanager
def _log_file(path: Path, own_thread: bool = False) -> Iterator[None]:
    """Write this process's (or only this thread's) log records and warnings to ``path`` meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk must not fill the terminal
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith("studio"))
    if own_thread:
        mine = threading.get_ident()
        handler.addFilter(lambda record: record.thread == mine)
    root = logging.getLogger()
    with nullcontext() if own_thread else _listening():
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)
            handler.close()


@contextmanager
def _listening() -> Iterator[None]:
    """The studio's records and all warnings reach the handlers meanwhile."""
    studio = logging.getLogger("studio")
    before = studio.level
    studio.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        studio.setLevel(before)
