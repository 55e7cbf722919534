"""The queue that carries ids of waiting jobs to workers: huey, on a SQLite file or on Redis.

huey provides what is tedious to get right: a FIFO on several back ends, a consumer loop with signals and a clean end.
It does not know running jobs, cannot stop one and forgets a message as soon as a worker has taken it; so the store
(:mod:`studio.jobs.store`) is authoritative, a message is only an id, and taking the same id twice does no harm.
"""

from __future__ import annotations

from typing import Any

from studio import settings

DEFAULT = "default"
"""The queue of jobs that take whatever device the machine offers."""


def name_for(device: str) -> str:
    """The queue of a device: workers serve one queue each."""
    return DEFAULT if device == "auto" else device


def connect(name: str) -> Any:
    """The :class:`huey.Huey` of queue ``name``; raises :class:`InputError` when its address is wrong."""
    return _task(name).huey


def put(queue_name: str, job_id: str) -> None:
    """Add a job to the end of a queue."""
    _task(queue_name)(job_id)


def waiting(queue_name: str) -> list[str]:
    """Ids in the queue, the next one first."""
    return [str(task.args[0]) for task in connect(queue_name).pending()]


def _task(name: str) -> Any:
    from studio.jobs import broker  # huey is not needed to look at jobs

    return broker.task(name, settings.load().queue_url, str(settings.folder() / "queue.db"))
