"""Kinds of jobs for the tests of the queue: they count instead of computing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from pydantic import Field

from adapters.errors import InputError
from adapters.progress import Monitor, Progress, check
from studio import jobs
from studio.schema import JobConfig


class CountConfig(JobConfig):
    """Count, and do something odd on the way."""

    kind: ClassVar[str] = "count"

    to: int = Field(3, description="How far.")
    pause: float = Field(0.0, description="Seconds per number.")
    device: str = Field("cpu", description="Where.")
    fail_at: int = Field(-1, description="Refuse at this number.")
    bug_at: int = Field(-1, description="Raise an unexpected error at this number.")
    die_at: int = Field(-1, description="Kill the own process at this number, the first time.")
    deaf: bool = Field(False, description="Never look whether to stop.")


def count(config: CountConfig, folder: Path, monitor: Monitor, resume: bool) -> dict[str, Any]:
    """Count to ``config.to``, from the number in the checkpoint on when resumed."""
    checkpoint = folder / "checkpoint.txt"
    first = int(checkpoint.read_text()) if resume and checkpoint.exists() else 0
    (folder / "starts.txt").open("a").write(f"{first}\n")
    for number in range(first, config.to):
        if not config.deaf:
            check(monitor)
        _mishap(config, number, resume)
        time.sleep(config.pause)
        checkpoint.write_text(str(number + 1))
        monitor.report(
            Progress("counting", number + 1, config.to, loss=1 / (number + 1), metrics={"speed": 2.0},
                     preview=Image.new("RGB", (900, 600), "red") if number == 1 else None)
        )  # fmt: skip
    return {"counted": config.to, "from": first, "pid": os.getpid(), "ended": time.time()}


def _mishap(config: CountConfig, number: int, resumed: bool) -> None:
    if number == config.fail_at:
        raise InputError("This number is not liked: choose another.")
    if number == config.bug_at:
        raise ZeroDivisionError("one over\nnothing")
    if number == config.die_at and not resumed:
        os.kill(os.getpid(), signal.SIGKILL)


jobs.register(jobs.Kind("count", "tests.studio.fake_jobs:CountConfig", "tests.studio.fake_jobs:count", continues=True))


class WhereConfig(JobConfig):
    """Read a file."""

    kind: ClassVar[str] = "where"

    file: str = Field(description="Which.")
    device: str = Field("cpu", description="Where.")


def where(config: WhereConfig, folder: Path, monitor: Monitor) -> dict[str, Any]:
    """Tell what ``config.file`` says."""
    return {"text": Path(config.file).read_text()}


jobs.register(jobs.Kind("where", "tests.studio.fake_jobs:WhereConfig", "tests.studio.fake_jobs:where"))
