"""The worker: a process of its own that takes jobs from one queue and runs them one after another.

``studio worker`` runs it in the foreground; :func:`ensure` starts it as its own session, so that it outlives the page
or command that needed it. It keeps the last pipeline loaded between compositions. When the package has been updated,
it restarts before the next job.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huey.consumer import Consumer
from huey.exceptions import CancelExecution

from adapters import files
from adapters.errors import InputError
from studio import settings
from studio.jobs import code, process, queue, store
from studio.jobs.execute import release_pipeline
from studio.jobs.monitor import STOPPING

logger = logging.getLogger("studio.worker")

ROOT = code.ROOT
"""The folder that holds the packages, for workers to import them from."""
BEAT_SECONDS = 2.0
STOP_SECONDS = 60.0
"""How long a job gets to reach a safe point when the worker is asked to stop."""


def ensure(name: str = queue.DEFAULT) -> None:
    """Start a worker for queue ``name`` unless one runs on this machine."""
    if running(name):
        return
    log = _log(name)
    with open(log, "ab") as output:
        begin = output.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", "studio.jobs.worker", name, "--on-demand"],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, close_fds=True, cwd=settings.folder(), env=_environment(),
        )  # fmt: skip

    who = {"host": process.host(), "pid": child.pid, "pid_started": process.started(child.pid)}
    files.write_text(_started(name), json.dumps({**who, "log_begin": begin}), sync=False)


def failed_start(name: str) -> str | None:
    """Why no worker serves queue ``name`` although :func:`ensure` started one; None while all is well."""
    try:
        who = json.loads(_started(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none was started, or it ended normally
        return None
    if process.alive(who) or running(name):
        return None
    with _log(name).open("rb") as stream:
        stream.seek(who["log_begin"])
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    reason = f": {lines[-1]}" if lines else "."
    return f"The worker of the queue '{name}' ended without running its jobs{reason} (its log: {_log(name)})"


def _log(name: str) -> Path:
    return settings.folder("logs") / f"worker-{_safe(name)}.log"


def _started(name: str) -> Path:
    """Holds the process that :func:`ensure` started for the queue; removed when that worker ends normally."""
    return settings.folder("locks") / f"started-{_safe(name)}.json"


def _environment() -> dict[str, str]:
    """Our environment, with the home folder set and this checkout importable from the worker's folder."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), settings.PREFIX + "HOME": str(settings.home())}


def running(name: str | None = None) -> list[dict[str, Any]]:
    """Workers that are alive: all, or those of queue ``name`` on this machine; dead ones are forgotten."""
    found = []
    for row in store.workers():
        if not process.alive(row):
            store.remove_worker(row["host"], row["pid"])
        elif name is None or (row["queue"] == name and row["host"] == process.host()):
            found.append(row)
    return found


def serve(name: str = queue.DEFAULT, idle_minutes: float = 0.0) -> bool:
    """Work on queue ``name`` until told to stop (SIGINT, SIGTERM), idle for long, or older than the package's files.

    Returns:
        Whether the package was updated: the job just taken waits for a worker with the new code (:func:`renew`).

    Raises:
        InputError: another worker of this machine serves the queue.
    """
    lock = FileLock(settings.folder("locks") / f"worker-{_safe(process.host())}-{_safe(name)}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"A worker for the queue '{name}' is already running on this machine.") from None
    me = process.identity()
    store.add_worker(**me, queue=name)
    carrier = queue.connect(name)
    loaded, updated = code.fingerprint(), threading.Event()
    try:
        put_back_lost(name)
        consumer = _Consumer(
            carrier, workers=1, periodic=False, initial_delay=0.05, backoff=1.2, max_delay=0.5,
            shutdown_timeout=STOP_SECONDS,
        )  # fmt: skip

        @carrier.pre_execute(name="same code")  # type: ignore[untyped-decorator]
        def same_code(_: Any) -> None:
            if code.fingerprint() != loaded:
                updated.set()
                STOPPING.set()
                consumer.stop_flag.set()
                raise CancelExecution  # the store still says "queued": the next worker puts the message back

        threading.Thread(target=_beat, args=(name, consumer, idle_minutes * 60), daemon=True).start()
        consumer.run()
    finally:
        carrier.unregister_pre_execute("same code")
        store.remove_worker(me["host"], me["pid"])
        lock.release()
    return updated.is_set()


def renew() -> None:
    """Replace this process by the same command with the code that is on disk now; does not return."""
    logger.warning("the package was updated: restarting")
    logging.shutdown()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class _Consumer(Consumer):  # type: ignore[misc]
    """huey's consumer, which asks the running job to stop before it waits for it."""

    def stop(self, graceful: bool = False) -> None:
        STOPPING.set()
        super().stop(graceful=True)


def put_back_lost(name: str) -> None:
    """Queue again jobs that wait in the store but not in the queue (a worker died between taking and starting)."""
    present = set(queue.waiting(name))
    waiting = [job for job in store.newest(1000, ["queued"]) if job.queue == name and job.id not in present]
    for job in reversed(waiting):
        queue.put(name, job.id)


def _beat(name: str, consumer: Consumer, idle_seconds: float) -> None:
    """Send heartbeats, and stop the worker when it has been idle for ``idle_seconds`` (0 = never)."""
    last_work = time.monotonic()
    me = process.identity()
    while not STOPPING.wait(BEAT_SECONDS):
        store.beat_worker(me["host"], me["pid"])
        at_work = [job for job in store.newest(50, ["running", "cancelling"]) if job.host == me["host"]]
        mine = [job for job in at_work if job.pid == me["pid"]]
        if at_work and not mine:
            release_pipeline()  # another process on this machine needs the memory now
        if mine or queue.waiting(name):
            last_work = time.monotonic()
        elif idle_seconds and time.monotonic() - last_work > idle_seconds:
            logger.info("idle, ending")
            STOPPING.set()
            consumer.stop_flag.set()


def _safe(text: str) -> str:
    return re.sub(r"[^\w.-]", "-", text)


def main(arguments: list[str]) -> int:
    """Entry point of the process that :func:`ensure` starts."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    on_demand = "--on-demand" in arguments
    name = next((word for word in arguments if not word.startswith("--")), queue.DEFAULT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit "ignore"
    try:
        if serve(name, settings.load().worker_idle_minutes if on_demand else 0.0):
            renew()
    except InputError as error:
        logger.warning("%s", error)
        return 0 if on_demand else 2
    except KeyboardInterrupt:
        logger.info("stopped while it started")
    _started(name).unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    # Under the name other modules import, so that there is one copy of this module's state.
    from studio.jobs import worker

    sys.exit(worker.main(sys.argv[1:]))
