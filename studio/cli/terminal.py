"""Progress: a bar in a terminal, plain lines in a file or pipe."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from adapters.progress import Progress
from studio.printable import printable

STOPPING = "Stopping at the next safe point (Ctrl-C again stops at once) ..."

_LINE_EVERY = 10.0  # seconds between plain lines of one stage


class Terminal:
    """A monitor for one long task; use it as a context manager.

    Ctrl-C asks the work to stop where it can; a second one stops it at once.

    Args:
        quiet: show nothing.
        stopping: what to say at the first Ctrl-C.
        on_end: if given, SIGTERM and SIGUSR1 (a scheduler, a shutdown) also ask the work to stop, and call this. They
            may come several times: launchers pass on signals that the process group has received already.
    """

    def __init__(
        self, quiet: bool = False, stopping: str = STOPPING, on_end: Callable[[], object] | None = None
    ) -> None:
        self.quiet = quiet
        self.stopping = stopping
        self.on_end = on_end
        self.bar: Any = None
        self.task: Any = None
        self.interrupted = False
        self._stage = ""
        self._preview = ""
        self._line_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        handlers: dict[str, Any] = {"SIGINT": self._on_interrupt}
        if self.on_end is not None:
            handlers |= {"SIGTERM": self._on_end, "SIGUSR1": self._on_end}
        for name, handler in handlers.items():
            try:
                number = getattr(signal, name)
                self._before[number] = signal.signal(number, handler)
            except (ValueError, AttributeError):  # not the main thread; a system without SIGUSR1
                continue
        if not self.quiet and sys.stderr.isatty():
            self.bar = _bar()
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:  # fmt: skip
        if self.bar is not None:
            self.bar.stop()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def report(self, progress: Progress) -> None:
        if self.quiet:
            return
        if self.bar is not None:
            self._draw(progress)
        else:
            self._line(progress)
        self._stage = progress.stage

    def cancelled(self) -> bool:
        return self.interrupted

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.console.print(printable(text, lines=True), highlight=False, markup=False)
        else:
            print(printable(text, lines=True), file=sys.stderr)

    def _draw(self, progress: Progress) -> None:
        if self.task is None or progress.stage != self._stage:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task = self.bar.add_task(progress.stage, total=progress.total or None, facts="")
        self.bar.update(self.task, completed=progress.step, total=progress.total or None, facts=_short(progress))
        if progress.message:
            self.say(progress.message)
        self._show_preview(progress)

    def _line(self, progress: Progress) -> None:
        now = time.monotonic()
        last = bool(progress.total) and progress.step >= progress.total
        if progress.message or last or progress.stage != self._stage or now - self._line_at >= _LINE_EVERY:
            self._line_at = now
            count = f" {progress.step}/{progress.total}" if progress.total else ""
            parts = [f"{progress.stage}{count}", _facts(progress), progress.message]
            print(printable("  ".join(part for part in parts if part), lines=True), file=sys.stderr, flush=True)

    def _show_preview(self, progress: Progress) -> None:
        if isinstance(progress.preview, str) and progress.preview != self._preview:
            self._preview = progress.preview
            self.say(f"preview: {progress.preview}")

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        if self.stopping:
            self.say(self.stopping)

    def _on_end(self, number: int, frame: FrameType | None) -> None:
        if self.on_end is not None:
            self.on_end()
        if not self.interrupted:
            self.interrupted = True
            self.say(f"{signal.Signals(number).name}: stopping at the next safe point ...")


def _short(progress: Progress) -> str:
    """The text beside a bar: the loss and the speed."""
    speed = progress.metrics.get("steps_per_second")
    parts = [] if progress.loss is None else [f"loss {progress.loss:.4f}"]
    return "  ".join(parts + ([] if speed is None else [f"{speed:.3g}/s"]))


def _facts(progress: Progress) -> str:
    parts = [] if progress.loss is None else [f"loss {progress.loss:.4f}"]
    parts += [f"{name} {value:.3g}" for name, value in progress.metrics.items()]
    return "  ".join(parts)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[facts]}"),
    )  # fmt: skip
    return Bar(*columns, console=Console(stderr=True), transient=True, expand=True)
