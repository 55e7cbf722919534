"""How long work reports itself and learns that it should stop.

One protocol serves the terminal, the job store and the web pages: a function that does long work takes a
``Monitor``, calls ``report`` after each unit of work and ``check`` where it can stop without losing anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from adapters.errors import Cancelled


@dataclass(frozen=True)
class Progress:
    """One report.

    Attributes:
        stage: what is being done, in a word or two ("loading", "training", "sampling").
        step: units finished; ``total`` units in this stage (0 = unknown).
        loss: training loss of this step, if there is one.
        metrics: further numbers by name (learning rate, steps per second, ...).
        preview: a ``PIL.Image`` or the path of one to show while the work goes on.
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
    """Listens to long work and may ask it to stop."""

    def report(self, progress: Progress) -> None: ...

    def cancelled(self) -> bool: ...


class Silent:
    """The monitor nobody looks at: ignores reports, never cancels."""

    def report(self, progress: Progress) -> None:
        return None

    def cancelled(self) -> bool:
        return False


class Changed:
    """A monitor that is told ``change(report)`` instead of each report."""

    def __init__(self, monitor: Monitor, change: Callable[[Progress], Progress]) -> None:
        self.monitor, self.change = monitor, change

    def report(self, progress: Progress) -> None:
        self.monitor.report(self.change(progress))

    def cancelled(self) -> bool:
        return self.monitor.cancelled()


def part(monitor: Monitor, number: int, count: int, label: str = "") -> Monitor:
    """The monitor of part ``number`` of ``count`` equal ones: its steps count within the whole.

    Args:
        label: is put before the stages, except of what is saved.
    """

    def change(progress: Progress) -> Progress:
        total = progress.total
        stage = f"{label}: {progress.stage}" if label and progress.stage != "saved" else progress.stage
        return replace(progress, stage=stage, step=progress.step + number * total, total=total * count)

    return Changed(monitor, change)


def check(monitor: Monitor) -> None:
    """Raise :class:`~adapters.errors.Cancelled` if the person asked to stop."""
    if monitor.cancelled():
        raise Cancelled("Stopped on request.")
