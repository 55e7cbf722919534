"""How long work reports itself and learns that it should stop.

One protocol serves the terminal, the job store and the web pages: a function that does long work takes a
``Monitor``, calls ``report`` after each unit of work and ``check`` where it can stop without losing anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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


def check(monitor: Monitor) -> None:
    """Raise :class:`~adapters.errors.Cancelled` if the person asked to stop."""
    if monitor.cancelled():
        raise Cancelled("Stopped on request.")
