"""The state of a job: status, stage, progress bar, times and preview."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio import jobs
from studio.jobs import Job
from ui import markup
from ui.errors import errors_shown
from ui.events import PRIVATE

TONES = {
    "queued": "wait", "running": "work", "cancelling": "wait", "done": "good", "failed": "bad", "cancelled": "",
    "interrupted": "bad",
}  # fmt: skip
VIEWS = {
    "compose": "compose", "compare": "compose", "sweep": "compose", "train-image": "train-image", "distill": "distill",
    "train-language": "train-language", "train-vision-language": "train-vision-language",
    "train-rna": "train-language", "classify-rna": "classify-rna",
    "train-speech": "train-language", "transcribe": "transcribe",
    "reconstruct": "reconstruct", "train-scene": "reconstruct",
    "federate": "federate", "forgetting": "forgetting", "soften": "forgetting",
}  # fmt: skip
"""Kind of job -> the kind whose page area shows it."""


@dataclass(frozen=True)
class Area:
    """The components of a page that show one job.

    Attributes:
        view: what the page's ``follow`` fills, ``job`` among it.
        shown: what was drawn last, for pages that skip what has not changed.
    """

    job: gr.State
    timer: gr.Timer
    cancel: gr.Button
    view: list[Any]
    resume: gr.Button | None = None
    shown: gr.State | None = None


Follow = Callable[..., Sequence[Any]]
"""``(job_id, shown, ...)`` -> values of an area's view; ``shown`` is () when everything is to be drawn again."""


def steer(area: Area, follow: Follow, gone: Callable[[], Sequence[Any]], more: Sequence[Any] = ()) -> None:
    """Keep the area of a job up to date, and let its buttons stop and resume the job.

    Args:
        gone: values of the view once the job is deleted.
        more: components whose values ``follow`` takes as well.
    """
    shown = gr.State(()) if area.shown is None else area.shown
    area.timer.tick(watcher(follow, gone), [area.job, shown, *more], area.view, **PRIVATE)
    area.cancel.click(stopper(follow), [area.job, *more], area.view, **PRIVATE)
    if area.resume is not None:
        area.resume.click(resumer(follow), [area.job, *more], area.view, **PRIVATE)


def watcher(follow: Follow, gone: Callable[[], Sequence[Any]]) -> Callable[..., Any]:
    """The handler of an area's timer; a job that was deleted meanwhile is not asked for again."""

    @errors_shown
    def look(job_id: str, shown: tuple[Any, ...], *values: Any) -> Any:
        try:
            return follow(job_id, shown, *values)
        except InputError:
            return gone()

    return look


def stopper(follow: Follow) -> Callable[..., Any]:
    """The handler of Cancel: ask the job to stop and let ``follow`` show its state."""

    @errors_shown
    def stop(job_id: str, *values: Any) -> Any:
        if job_id:
            jobs.cancel(job_id)
        return follow(job_id, (), *values)

    return stop


def resumer(follow: Follow) -> Callable[..., Any]:
    """The handler of Resume: queue the job again and let ``follow`` show its state."""

    @errors_shown
    def go_on(job_id: str, *values: Any) -> Any:
        jobs.resume(job_id)
        jobs.ensure_worker()
        return follow(job_id, (), *values)

    return go_on


def status_tag(job: Job) -> str:
    """The job's status as a coloured label."""
    return markup.tag(job.status, TONES.get(job.status, ""))


def job_title(job: Job) -> str:
    """What the job is about: the prompt, or the adapter's name."""
    title = job.config.get("prompt") or job.config.get("name") or job.config.get("adapter") or job.id
    return str(title)


def job_panel(job: Job, ahead: int = 0, preview: str | None = None) -> str:
    """The panel of one job; ``ahead`` jobs run before it, ``preview`` is a picture to show while it runs."""
    fraction = _fraction(job)
    head = f'<div class="as-job-head">{status_tag(job)}<span class="what">{markup.text(stage(job, ahead))}</span></div>'
    bar = _bar(fraction) if job.active else ""
    picture = _picture(preview) if preview and job.active else ""
    error = markup.notice(job.error, "error") if job.error else ""
    if job.status == "queued":
        error = "".join(markup.notice(text, "error") for text in jobs.trouble())
    times = f'<div class="as-job-times">{markup.text(timing(job, fraction))}</div>' if job.active else ""
    return f'<div class="as-job" role="status">{picture}<div class="as-job-body">{head}{bar}{times}{error}</div></div>'


def ahead(job: Job) -> int:
    """How many jobs come before a waiting one."""
    if job.status != "queued":
        return 0
    waiting = jobs.list(1000, jobs.ACTIVE)
    return sum(other.created < job.created for other in waiting)


def stage(job: Job, ahead: int = 0) -> str:
    """What is being done, in a few words."""
    if job.status == "queued":
        return f"waiting, {ahead} ahead of it" if ahead else "waiting for the worker"
    if job.status == "cancelling":
        return "stopping"
    if not job.active:
        return timing(job)
    if job.progress is None:
        return "starting"
    counted = f" {job.progress.step} of {job.progress.total}" if job.progress.total else ""
    return f"{job.progress.stage}{counted}"


def timing(job: Job, fraction: float | None = None, now: float | None = None) -> str:
    """Elapsed and remaining time, or how long it took."""
    if job.started is None:
        return ""
    if job.seconds is not None:
        return f"took {markup.duration(job.seconds)}"
    passed = job.earlier + (time.time() if now is None else now) - job.started
    left = passed * (1 - fraction) / fraction if fraction and fraction > 0.05 and passed > 2 else None
    return f"{markup.duration(passed)}" + (f" · about {markup.duration(left)} left" if left else "")


def _fraction(job: Job) -> float | None:
    return job.progress.fraction if job.progress and job.status in ("running", "cancelling") else None


def _bar(fraction: float | None) -> str:
    if fraction is None:
        return '<div class="as-bar busy" role="progressbar" aria-label="Progress"><i></i></div>'
    percent = round(fraction * 100)
    return (
        f'<div class="as-bar" role="progressbar" aria-label="Progress" aria-valuenow="{percent}" aria-valuemin="0" '
        f'aria-valuemax="100"><i style="width:{percent}%"></i></div>'
    )


def _picture(path: str) -> str:
    return f'<img class="as-preview" alt="Picture so far" src="{markup.text(markup.file_url(path))}">'
