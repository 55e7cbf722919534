"""The monitor of a job: every report goes to the store, previews to the job's folder, messages to its log."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.progress import Monitor, Progress
from studio.jobs import store
from studio.jobs.model import ProgressRow

logger = logging.getLogger("studio.jobs")

STOPPING = threading.Event()
"""Set when this process is asked to end: the running job stops where it can and stays resumable."""

PREVIEW_SIDE = 512
_ASK_EVERY = 0.2
_WRITE_EVERY = 0.1


class JobMonitor:
    """Records one job's reports and tells it when to stop.

    Args:
        job_id, folder: the job.
        also: a second listener, such as the terminal's progress bar; it may cancel too.
    """

    def __init__(self, job_id: str, folder: Path, also: Monitor | None = None) -> None:
        self.job_id = job_id
        self.folder = folder
        self.also = also
        self._stage = ""
        self._written = 0.0
        self._asked = 0.0
        self._cancelled = False

    def report(self, progress: Progress) -> None:
        now = time.time()
        preview = self._preview(progress)
        row = ProgressRow(
            stage=progress.stage, step=progress.step, total=progress.total, loss=_number(progress.loss),
            metrics={name: float(value) for name, value in progress.metrics.items()},
            preview=preview, message=progress.message, time=now,
        )  # fmt: skip
        keep = bool(row.loss is not None or row.metrics or preview or row.message or row.stage != self._stage)
        if keep or now - self._written >= _WRITE_EVERY or row.step >= row.total:
            store.add_progress(self.job_id, row, keep)
            self._written = now
        if row.message:
            logger.info("%s: %s", row.stage, row.message)
        elif row.stage != self._stage:
            logger.info("%s", row.stage)
        self._stage = row.stage
        if self.also:
            self.also.report(replace(progress, preview=preview))

    def cancelled(self) -> bool:
        if STOPPING.is_set() or self._cancelled or (self.also is not None and self.also.cancelled()):
            return True
        now = time.monotonic()
        if now - self._asked >= _ASK_EVERY:
            self._asked = now
            job = store.read(self.job_id)
            self._cancelled = job is None or job.status != "running"
        return self._cancelled

    def _preview(self, progress: Progress) -> str | None:
        preview = progress.preview
        if preview is None:
            return None
        if isinstance(preview, (str, os.PathLike)):
            return str(Path(preview).absolute())
        return str(save_preview(preview, self.folder / "previews", progress.step))


class Several:
    """Jobs that run as one, shown by one listener: the steps of all added up, and the loss of each by its name."""

    def __init__(self, to: Monitor) -> None:
        self.to = to
        self._latest: dict[int, tuple[str, Progress]] = {}

    def part(self, name: str) -> Monitor:
        """The listener of the job called ``name``."""
        number = len(self._latest)
        self._latest[number] = (name, Progress(""))
        return _Part(self, number, name)

    def report(self, number: int, name: str, progress: Progress) -> None:
        if progress.message or progress.loss is None:
            stage = f"{name}: {progress.stage}"
            self.to.report(replace(progress, stage=stage, step=0, total=0, loss=None, metrics={}))
            return
        self._latest[number] = (name, progress)
        rows = [row for row in self._latest.values() if row[1].total]
        self.to.report(Progress(
            progress.stage, sum(row.step for _, row in rows), sum(row.total for _, row in rows),
            metrics={name: row.loss for name, row in rows if row.loss is not None},
        ))  # fmt: skip


class _Part:
    def __init__(self, several: Several, number: int, name: str) -> None:
        self._several, self._number, self._name = several, number, name

    def report(self, progress: Progress) -> None:
        self._several.report(self._number, self._name, progress)

    def cancelled(self) -> bool:
        return self._several.to.cancelled()


def save_preview(image: Any, folder: Path, step: int) -> Path:
    """Write ``image`` as a WebP of at most 512 pixels a side (under a temporary name first) and return its path."""
    folder.mkdir(exist_ok=True)
    small = image.copy()
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    file = folder / f"{step:06d}.webp"
    draft = folder / f".{step:06d}.tmp"
    small.convert("RGB").save(draft, format="WEBP", quality=85)
    draft.replace(file)
    return file


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
