"""The queue that carries ids of waiting jobs to workers: huey, on a SQLite file or on Redis.

huey gives what is tedious to get right: a FIFO on several back ends, a consumer loop with signals and a clean end.
It does not know running jobs, cannot stop one and forgets a message as soon as a worker has taken it; so the store
(:mod:`studio.jobs.store`) keeps the truth, a message is only an id, and taking the same id twice does no harm.
Messages are JSON instead of huey's pickle: whoever can write to a Redis server cannot make a worker run code.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import huey
from huey.registry import Message
from huey.serializer import Serializer

from adapters.errors import InputError, MissingDependencyError
from studio import settings

DEFAULT = "default"
"""The queue of jobs that take whatever device the machine offers."""

TASK = "studio-job"


class _Json(Serializer):  # type: ignore[misc]
    def _serialize(self, data: Any) -> bytes:
        return json.dumps(data._asdict() if isinstance(data, Message) else data).encode()

    def _deserialize(self, data: bytes) -> Any:
        values = json.loads(bytes(data))
        return Message(**values) if isinstance(values, dict) and "kwargs" in values else values


def name_for(device: str) -> str:
    """The queue of a device: workers serve one queue each."""
    return DEFAULT if device == "auto" else device


def connect(name: str) -> huey.Huey:
    """The queue ``name`` of the current home folder; raises :class:`InputError` when its address is wrong."""
    return _task(name).huey


def _task(name: str) -> Any:
    return _connect(name, settings.load().queue_url, str(settings.folder() / "queue.db"))


@lru_cache(maxsize=16)
def _connect(name: str, url: str, file: str) -> Any:
    options: dict[str, Any] = {"results": False, "serializer": _Json(), "utc": True}
    if not url:
        queue: huey.Huey = huey.SqliteHuey(f"studio-{name}", filename=file, strict_fifo=True, timeout=30, **options)
    elif url.startswith(("redis://", "rediss://", "unix://")):
        queue = _redis(name, url, options)
    else:
        raise InputError(f"The queue address '{url}' is not understood: leave it empty or give redis://host:port/0.")
    return queue.task(name=TASK)(_run)


def _redis(name: str, url: str, options: dict[str, Any]) -> huey.Huey:
    try:
        import redis
    except ImportError:
        raise MissingDependencyError("redis", "redis", "A job queue on Redis") from None
    try:
        redis.Redis.from_url(url, socket_connect_timeout=5).ping()
    except (redis.RedisError, ValueError) as error:
        raise InputError(f"No Redis server answers at {url}: {error}.") from None
    return huey.RedisHuey(f"studio-{name}", url=url, **options)


def put(queue_name: str, job_id: str) -> None:
    """Add a job to the end of a queue."""
    _task(queue_name)(job_id)


def waiting(queue_name: str) -> list[str]:
    """Ids in the queue, next first."""
    return [str(task.args[0]) for task in connect(queue_name).pending()]


def _run(job_id: str) -> None:
    from studio.jobs.execute import execute

    execute(job_id)
