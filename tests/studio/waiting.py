"""Waiting for jobs in tests."""

from __future__ import annotations

import time
from collections.abc import Callable

from studio import jobs


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait until ``condition()`` holds; fail when it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.03)


def ended(*ids: str) -> list[jobs.Job]:
    """The jobs, once none of them waits or works any more."""
    until(lambda: not any(jobs.get(job).active for job in ids))
    return [jobs.get(job) for job in ids]


def reached(job_id: str, step: int) -> None:
    """Wait until a job has reported ``step``."""

    def there() -> bool:
        progress = jobs.get(job_id).progress
        return progress is not None and progress.step >= step

    until(there)
