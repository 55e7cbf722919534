"""Processes: our own identity, and whether the one that runs a job is still alive."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

SILENT_SECONDS = 60.0
"""A process on another machine without a heartbeat for this long counts as dead."""


@cache
def host() -> str:
    return socket.gethostname()


def started(pid: int) -> float:
    """When process ``pid`` started, which tells it from a later one with the same number; 0 when it is gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return 0.0


def identity() -> dict[str, Any]:
    """host, pid and pid_started of this process."""
    pid = os.getpid()
    return {"host": host(), "pid": pid, "pid_started": started(pid)}


def alive(who: Mapping[str, Any]) -> bool:
    """Whether the process described by host, pid, pid_started and heartbeat still runs."""
    if who["host"] != host():
        return time.time() - (who["heartbeat"] or 0) < SILENT_SECONDS
    return bool(abs(started(who["pid"]) - who["pid_started"]) < 1.0)


def kill(who: Mapping[str, Any]) -> bool:
    """Kill a process on this machine and wait until it is gone; returns whether that worked."""
    if who["host"] != host() or not alive(who):
        return False
    import psutil

    process = psutil.Process(who["pid"])
    process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    psutil.wait_procs([process], timeout=5)
    return not alive(who)
