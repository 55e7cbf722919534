"""The queue's huey, on a SQLite file or on Redis, with messages as JSON.

huey pickles by default; with JSON, whoever can write to a Redis server cannot make a worker run code.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import huey
from huey.registry import Message
from huey.serializer import Serializer

from adapters.errors import InputError, MissingDependencyError

TASK = "studio-job"


class _Json(Serializer):  # type: ignore[misc]
    def _serialize(self, data: Any) -> bytes:
        return json.dumps(data._asdict() if isinstance(data, Message) else data).encode()

    def _deserialize(self, data: bytes) -> Any:
        values = json.loads(bytes(data))
        return Message(**values) if isinstance(values, dict) and "kwargs" in values else values


@lru_cache(maxsize=16)
def task(name: str, url: str, file: str) -> Any:
    """The huey task "run this job" of the queue ``name``; calling it queues a job, ``.huey`` is the queue itself.

    Args:
        url: address of a Redis server; empty = the SQLite ``file``.

    Raises:
        InputError: the address is wrong or nothing answers there.
        MissingDependencyError: the address is Redis's and the package is not installed.
    """
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


def _run(job_id: str) -> None:
    from studio.jobs.execute import execute

    execute(job_id)
