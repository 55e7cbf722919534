"""How long-running work reports progress and is cancelled.

One protocol serves the terminal, the job store and the web pages: a long-running function takes a ``Monitor``, calls
``report`` after each unit of work and ``check`` where it can stop without losing anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from adapters.errors import Cancelled


@dataclass(frozen=True)
class Progress:
    """One progress report.

    Attributes:
        stage: what is being done, in a word or two ("loading", "training", "sampling").
        step: units finished.
        total: units in this stage; 0 = unknown.
        loss: training loss of this step, if there is one.
        metrics: further values by name (learning rate, steps per second, ...).
        preview: a ``PIL.Image``, or the path of one, to show during the work.
        message: one line for the log.
    """

    stage: str
    step: int = 0
    total: int = 0
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    preview: Any = None
    message: str = ""


class Monitor(Protocol):
    """Receives progress reports and may ask the work to stop."""

    def report(self, progress: Progress) -> None: ...

    def cancelled(self) -> bool: ...


class Silent:
    """A monitor that ignores reports and never cancels."""

    def report(self, progress: Progress) -> None:
        return None

    def cancelled(self) -> bool:
        return False


class Changed:
    """Passes ``change(report)`` on to ``monitor`` for each report."""

    def __init__(self, monitor: Monitor, change: Callable[[Progress], Progress]) -> None:
        self.monitor, self.change = monitor, change

    def report(self, progress: Progress) -> None:
        self.monitor.report(self.change(progress))

    def cancelled(self) -> bool:
        return self.monitor.cancelled()


def part(monitor: Monitor, number: int, count: int, label: str = "") -> Monitor:
    """A monitor for part ``number`` (from 0) of ``count`` equal parts; its steps are counted within the whole.

    Args:
        label: put before the name of each stage, except "saved".
    """

    def change(progress: Progress) -> Progress:
        total = progress.total
        stage = f"{label}: {progress.stage}" if label and progress.stage != "saved" else progress.stage
        return replace(progress, stage=stage, step=progress.step + number * total, total=total * count)

    return Changed(monitor, change)


def check(monitor: Monitor) -> None:
    """Raise :class:`~adapters.errors.Cancelled` if ``monitor`` asks to stop."""
    if monitor.cancelled():
        raise Cancelled("Stopped on request.")
