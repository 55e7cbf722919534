"""What a job is, as pages and commands see it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from adapters.progress import Progress

Status = Literal["queued", "running", "cancelling", "done", "failed", "cancelled", "interrupted"]
STATUSES: tuple[str, ...] = get_args(Status)
ACTIVE: tuple[Status, ...] = ("queued", "running", "cancelling")
ENDED: tuple[Status, ...] = ("done", "failed", "cancelled", "interrupted")


@dataclass(frozen=True)
class ProgressRow:
    """One report of a running job (see :class:`adapters.progress.Progress`), with the moment it was made."""

    stage: str
    step: int = 0
    total: int = 0
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    preview: str | None = None
    """Path of a picture."""
    message: str = ""
    time: float = 0.0
    """Seconds since the epoch."""

    def as_progress(self, quiet: bool = False) -> Progress:
        """The report as it was made, without its message when ``quiet``."""
        message = "" if quiet else self.message
        return Progress(self.stage, self.step, self.total, self.loss, self.metrics, self.preview, message)

    @property
    def fraction(self) -> float | None:
        """How much of the stage is done, 0 to 1; None when its length is unknown."""
        return min(1.0, self.step / self.total) if self.total else None


@dataclass(frozen=True)
class Job:
    """One job. Times are seconds since the epoch, None for what has not happened yet."""

    id: str
    kind: str
    status: Status
    config: dict[str, Any]
    created: float
    folder: Path
    device: str = "auto"
    started: float | None = None
    finished: float | None = None
    progress: ProgressRow | None = None
    error: str = ""
    """A sentence when the job failed or was interrupted, else empty."""
    result: dict[str, Any] | None = None
    queue: str = ""
    host: str = ""
    pid: int | None = None
    resuming: bool = False
    earlier: float = 0.0
    """Seconds it ran before it was resumed."""
    cwd: Path = Path()
    """The folder from which it was submitted: relative paths in its configuration start there."""

    @property
    def active(self) -> bool:
        """Waiting or running."""
        return self.status in ACTIVE

    @property
    def seconds(self) -> float | None:
        """How long it ran in all, None while it runs or before it started."""
        if not self.finished:
            return None
        return self.earlier + (self.finished - self.started if self.started else 0.0) or None

    def as_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {**asdict(self), "folder": str(self.folder), "cwd": str(self.cwd)}
