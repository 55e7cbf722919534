"""A training on its page: progress, loss, samples, and buttons for the adapter.

Shared by the pages that start trainings; ``prefix`` keeps their element ids apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from studio import jobs, library
from studio.jobs import Job
from studio.training import saved
from studio.training.saved import step_of
from ui import markup
from ui.components import job_panel, loss_plot
from ui.errors import errors_shown
from ui.events import PRIVATE

SECONDS = 1.0


@dataclass
class Run:
    """The right side of a page that starts trainings."""

    job: gr.State
    shown: gr.State
    adapter: gr.State
    timer: gr.Timer
    panel: gr.HTML
    plot: gr.HTML
    samples: gr.Gallery
    cancel: gr.Button
    resume: gr.Button
    done: gr.Row
    try_it: gr.Button
    keep: gr.Button
    download: gr.DownloadButton
    step: gr.Dropdown
    empty: str

    @classmethod
    def draw(cls, prefix: str, empty: str) -> Run:
        """Draw it; ``empty`` is shown until there is a training."""
        job, shown, adapter = gr.State(""), gr.State(()), gr.State("")
        timer = gr.Timer(SECONDS, active=False)
        panel = gr.HTML(empty, elem_id=f"{prefix}-panel", apply_default_css=False)
        with gr.Row(elem_classes="as-actions-row"):
            cancel = gr.Button("Cancel and keep what is learnt", variant="stop", visible=False, size="md",
                               elem_id=f"{prefix}-cancel")  # fmt: skip
            resume = gr.Button("Resume", visible=False, size="md", elem_id=f"{prefix}-resume")
        with gr.Row(visible=False, elem_classes="as-actions-row", elem_id=f"{prefix}-done") as done:
            step = gr.Dropdown([], label="Which step", visible=False, interactive=True, elem_id=f"{prefix}-step",
                               info="A picture below chooses its step.")  # fmt: skip
            try_it = gr.Button("Try it in Compose", variant="primary", size="md", elem_id=f"{prefix}-try-it")
            keep = gr.Button("Add to library", size="md", elem_id=f"{prefix}-keep")
            download = gr.DownloadButton("Download", size="md")
        plot = gr.HTML("", elem_id=f"{prefix}-loss-plot", apply_default_css=False)
        samples = gr.Gallery(label="Samples", show_label=False, columns=3, height="auto", object_fit="contain",
                             visible=False, interactive=False, elem_id=f"{prefix}-samples-drawn")  # fmt: skip
        return cls(
            job, shown, adapter, timer, panel, plot, samples, cancel, resume, done, try_it, keep, download, step, empty
        )

    @property
    def view(self) -> list[Any]:
        return [self.job, self.shown, self.timer, self.panel, self.plot, self.samples, self.cancel, self.resume,
                self.done, self.keep, self.download, self.adapter, self.step]  # fmt: skip

    def follow_job(self, start: gr.Button, begin: Callable[..., str], inputs: list[Any]) -> None:
        """Let ``start`` call ``begin(*inputs)``, which submits a job and returns its id, and follow that job."""

        @errors_shown
        def started(*values: Any) -> Any:
            job_id = begin(*values)
            jobs.ensure_worker()
            return follow(job_id, ())

        def gone() -> list[Any]:
            off = gr.update(visible=False)
            return ["", (), gr.Timer(active=False), self.empty, "", *[off] * 5, gr.skip(), "", off]

        @errors_shown
        def keep(job_id: str, step: Any) -> Any:
            name = add_to_library(jobs.get(job_id), step)
            gr.Info(f"It is in the library as '{markup.text(name)}'.", title="Added")
            return name

        start.click(started, inputs, self.view, **PRIVATE)
        start.click(None, None, None, js=TO_RESULT)
        area = job_panel.Area(self.job, self.timer, self.cancel, self.view, self.resume, self.shown)
        job_panel.steer(area, follow, gone)
        self.keep.click(keep, [self.job, self.step], self.adapter, **PRIVATE)
        self.step.input(chosen_file, [self.job, self.step], self.download, **PRIVATE)
        self.samples.select(step_of_sample, self.job, [self.step, self.download], **PRIVATE)


def chosen_file(job_id: str, step: Any) -> Any:
    """The file to download for a chosen step."""
    place = saved.steps(jobs.get(job_id)).get(int(step or 0)) if job_id else None
    return gr.update(value=str(place)) if place and place.is_file() else gr.skip()


def step_of_sample(job_id: str, event: gr.SelectData) -> Any:
    """The saved step of a clicked sample; nothing if none was saved then."""
    words = event.value.get("caption") if isinstance(event.value, dict) else ""
    number = (words or "").removeprefix("step ")
    if not number.isdigit() or int(number) not in saved.steps(jobs.get(job_id)):
        return gr.skip(), gr.skip()
    return int(number), chosen_file(job_id, int(number))


TO_RESULT = """() => { if (window.innerWidth < 760)
  [...document.querySelectorAll('.as-training-result')].find((e) => e.offsetParent)
    ?.scrollIntoView({behavior: 'smooth', block: 'start'}); }"""


def follow(job_id: str, shown: tuple[Any, ...]) -> Any:
    """The right side for a job; nothing changes while ``shown`` is up to date."""
    if not job_id:
        return gr.skip()
    job = jobs.get(job_id)
    drawn = samples(job)
    now = (job.id, job.status, job.progress.step if job.progress else 0, job.progress.stage if job.progress else "",
           len(drawn))  # fmt: skip
    if now == tuple(shown) and job.status != "running":
        return gr.skip()
    new_steps = not shown or (job.id, job.status) != tuple(shown[:2])
    new_samples = not shown or (now[0], now[-1]) != (shown[0], shown[-1])
    steps = {} if job.active else saved.steps(job)
    file = list(steps.values())[-1] if steps else None
    return [
        job.id, now, gr.Timer(active=job.active), job_panel.job_panel(job, job_panel.ahead(job)),
        _kept(job) + pair(job) + loss_plot.of_job(job),
        gr.update(value=drawn, visible=bool(drawn)) if new_samples else gr.skip(),
        gr.update(visible=job.active, value="Stop now" if job.status == "cancelling" else _CANCEL),
        gr.update(visible=job.status in ("cancelled", "interrupted", "failed")),
        gr.update(visible=bool(steps)),
        gr.update(visible=bool(steps) and (len(steps) > 1 or not in_library(job))),
        gr.update(value=str(file)) if file and file.is_file() else gr.skip(),
        gr.skip() if shown and shown[0] == job.id else "",
        _choices(steps) if new_steps else gr.skip(),
    ]  # fmt: skip


def _choices(steps: Mapping[int, Path]) -> Any:
    """The saved steps to choose from, the latest selected; hidden if there is only one."""
    listed = [(f"step {step}", step) for step in reversed(steps)]
    return gr.update(choices=listed, value=listed[0][1] if listed else None, visible=len(listed) > 1)


_CANCEL = "Cancel and keep what is learnt"


def _kept(job: Job) -> str:
    name = in_library(job) if job.status == "done" else ""
    return markup.notice(f"The adapter is in your library as '{name}'.", "info") if name else ""


def samples(job: Job) -> list[tuple[str, str]]:
    """Sample pictures with their step as caption, newest first; the teacher's come last."""
    files = sorted(job.folder.rglob("step-*.png"), reverse=True)
    drawn = [(str(file), f"step {step_of(file)}") for file in files if not file.name.startswith(".")]
    return [*drawn, *((str(file), "teacher") for file in sorted(job.folder.glob("samples/teacher-*.png")))]


def in_library(job: Job) -> str:
    """The library name under which the job added its adapter; empty if it did not, or the adapter is gone."""
    name = str((job.result or {}).get("library") or "")
    return name if name and any(record.name == name for record in library.adapters()) else ""


def add_to_library(job: Job, step: Any = None) -> str:
    """Put the adapter of a training into the library (the latest, or that of a step) and return its name there.

    Raises:
        InputError: there is no adapter yet.
    """
    if step in (None, "") and (name := in_library(job)):
        return name
    return saved.keep(job, None if step in (None, "") else int(step)).name


def pair(job: Job) -> str:
    """The sample prompts without and with the finished adapter, side by side."""
    found = (job.result or {}).get("pairs") or []
    rows = "".join(
        f'<figure class="as-pair">{_shown(drawn["without"], "without")}{_shown(drawn["with_"], "with")}'
        f"<figcaption>{markup.text(drawn['prompt'])}, seed {drawn['seed']}</figcaption></figure>"
        for drawn in found if Path(drawn["without"]).is_file() and Path(drawn["with_"]).is_file()
    )  # fmt: skip
    return f'<section class="as-pairs" aria-label="Without and with the adapter">{rows}</section>' if rows else ""


def _shown(file: str, words: str) -> str:
    return f'<span><img alt="{words} the adapter" src="{markup.text(markup.file_url(file))}"><em>{words}</em></span>'
