"""Devices: what "auto" means on this machine, and the lock that lets one job at a time use a device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from studio import settings
from studio.jobs.process import host


def resolve(device: str) -> str:
    """The device's full name ("cuda:0"); "auto" is the best one torch finds here."""
    if device == "cuda":
        return "cuda:0"
    return _best() if device == "auto" else device


def _best() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda:0"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def exclusive(device: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold ``device`` (a resolved name) for this process alone.

    ``waiting`` is called several times a second while another job holds it, and may raise to give up. The operating
    system releases the lock when its holder dies.
    """
    name = re.sub(r"[^\w.-]", "-", f"{host()}-{device}")
    lock = FileLock(settings.folder("locks") / f"{name}.lock")
    while True:
        try:
            lock.acquire(timeout=0.25)
            break
        except Timeout:
            waiting()
    try:
        yield
    finally:
        lock.release()
