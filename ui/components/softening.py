"""Soften an adapter's intruders on the Library page: the lambda slider, the control, the forgetting curve."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio import jobs, settings
from studio.inspection import intruders
from studio.jobs import Job
from ui import markup, pictures
from ui.components.forgetting_plot import forgetting_plot
from ui.components.job_panel import Area, ahead, job_panel, steer
from ui.errors import errors_shown, say
from ui.events import PRIVATE

KINDS = ("forgetting", "soften")
STRENGTH = 0.75
SECONDS = 1.0
TEXTS = (".txt", ".md")


@dataclass
class Softening:
    """The slider and what can be done at its lambda."""

    strength: gr.Slider
    size: gr.HTML
    keep: gr.Button
    old: gr.File
    new: gr.File
    measure: gr.Button
    job: gr.State
    shown: gr.State
    rows: gr.State
    """Of the last forgetting job; empty when there is none."""
    timer: gr.Timer
    panel: gr.HTML
    cancel: gr.Button
    plot: gr.HTML

    @property
    def view(self) -> list[Any]:
        return [self.job, self.shown, self.timer, self.panel, self.cancel, self.rows, self.plot]


def draw() -> Softening:
    """Draw it inside the current column."""
    strength = gr.Slider(0, 1.5, STRENGTH, step=0.05, label="Lambda", elem_id="soften-lambda",
                         info="factor on intruders: 0 removes them, 1 changes nothing, more amplifies")  # fmt: skip
    size = gr.HTML("", elem_id="soften-size", elem_classes="as-help", apply_default_css=False)
    keep = gr.Button("Save a softened copy and the control", size="md", elem_id="soften-keep")
    gr.HTML(
        "<p>Measure forgetting at every lambda: drop pictures (captions as .txt) or, for a language model, a text, of "
        "what the base could do before. Whether softening is better than shrinking the whole update is contested, so "
        "both are measured.</p>", elem_classes="as-help", apply_default_css=False,
    )  # fmt: skip
    old = gr.File(label="What the base knew", file_count="multiple", file_types=["image", *TEXTS], height=110,
                  elem_id="soften-old")  # fmt: skip
    new = gr.File(label="What was learnt (optional)", file_count="multiple", file_types=["image", *TEXTS], height=110,
                  elem_id="soften-new")  # fmt: skip
    measure = gr.Button("Measure forgetting", size="md", elem_id="soften-measure")
    job, shown, rows = gr.State(""), gr.State(()), gr.State([])
    timer = gr.Timer(SECONDS, active=False)
    panel = gr.HTML("", elem_id="soften-panel", apply_default_css=False)
    cancel = gr.Button("Cancel", variant="stop", visible=False, size="md", elem_id="soften-cancel")
    plot = gr.HTML("", elem_id="soften-plot", apply_default_css=False)
    return Softening(strength, size, keep, old, new, measure, job, shown, rows, timer, panel, cancel, plot)


def wire(softening: Softening, chosen: gr.State, asked: Sequence[Any], report: gr.State) -> None:
    """Follow the chosen adapter, the slider and the jobs.

    Args:
        asked: components for base, k and eps.
        report: the report on the layers, or None.
    """
    eps = asked[-1]

    def begin(kind: str, name: str, values: Mapping[str, Any], base: str | None, k: float | None, eps: float) -> Any:
        if not base:
            raise InputError("Choose the base that the adapter was trained on.")
        job_id = jobs.submit(kind, {"adapter": name, "base": base, "k": int(k or 10), "eps": eps, **values})
        jobs.ensure_worker()
        return follow(job_id, (), float(values.get("strength", STRENGTH)))

    @errors_shown
    def keep(name: str, strength: float, *asked: Any) -> Any:
        return begin("soften", name, {"strength": strength}, *asked)

    @errors_shown
    def measure(name: str, strength: float, old: list[str] | None, new: list[str] | None, *asked: Any) -> Any:
        if not old:
            raise InputError("Drop something the base knew before: pictures, or a text for a language model.")
        values = {"old": kept(old, f"{name}-old"), "new": kept(new or (), f"{name}-new")}
        return begin("forgetting", name, values, *asked)

    s = softening
    s.keep.click(keep, [chosen, s.strength, *asked], s.view, **PRIVATE)
    s.measure.click(measure, [chosen, s.strength, s.old, s.new, *asked], s.view, **PRIVATE)
    steer(Area(s.job, s.timer, s.cancel, s.view, shown=s.shown), follow, nothing, [s.strength])
    chosen.change(errors_shown(latest), [chosen, s.strength], s.view, **PRIVATE)
    s.strength.change(
        lambda rows, strength: forgetting_plot(rows, strength), [s.rows, s.strength], s.plot,
        trigger_mode="always_last", **PRIVATE,
    )  # fmt: skip
    gr.on(
        [s.strength.change, eps.change, report.change], size_of, [report, eps, s.strength], s.size,
        trigger_mode="always_last", **PRIVATE,
    )  # fmt: skip


def size_of(report: Mapping[str, Any] | None, eps: float, strength: float) -> str:
    """How much of the update a lambda leaves; empty before the layers were inspected."""
    if not report:
        return ""
    factor = intruders.shrink_factor(report, eps, strength)
    return (
        f"<p>At lambda {strength:g} the update has <b>{factor:.0%}</b> of its size; the control is the whole update "
        f"times {factor:.2f}.</p>"
    )


def kept(files: Sequence[str], name: str) -> str:
    """Copy dropped pictures to a folder, or a dropped text to a file; returns its path, empty for nothing.

    Raises:
        InputError: several texts without a picture, or pictures that cannot be read.
    """
    if not files:
        return ""
    paths = [Path(file) for file in files]
    if any(path.suffix.lower() not in TEXTS for path in paths):
        items, problems = pictures.receive(paths)
        if problems:
            say(" ".join(problems), title="Left out")
        return str(pictures.keep(items, name))
    if len(paths) > 1:
        raise InputError("Drop pictures with their captions, or one text for a language model.")
    place = settings.folder("datasets", f"{name}-{time.strftime('%y%m%d-%H%M%S')}") / paths[0].name
    shutil.copyfile(paths[0], place)
    return str(place)


def latest(name: str, strength: float) -> Any:
    """State of the last job on an adapter, and its curve."""
    found = _jobs_about(name)
    return follow(found[0].id, (), strength) if found else nothing()


def nothing() -> list[Any]:
    """The view of no job."""
    return ["", (), gr.Timer(active=False), "", gr.update(visible=False), [], ""]


def follow(job_id: str, shown: tuple[Any, ...], strength: float) -> Any:
    """The view of a job; nothing changes while ``shown`` is up to date."""
    if not job_id:
        return gr.skip()
    job = jobs.get(job_id)
    now = (job.id, job.status, job.progress.step if job.progress else 0)
    if now == tuple(shown) and job.status != "running":
        return gr.skip()
    rows: Any = gr.skip()
    if not job.active:
        rows = rows_of(str(job.config["adapter"]))
    return [
        job.id, now, gr.Timer(active=job.active), job_panel(job, ahead(job)) + _kept_as(job),
        gr.update(visible=job.active, value="Stop now" if job.status == "cancelling" else "Cancel"), rows,
        gr.skip() if job.active else forgetting_plot(rows, strength),
    ]  # fmt: skip


def rows_of(name: str) -> list[dict[str, Any]]:
    """Rows of the last finished forgetting job on an adapter."""
    for job in _jobs_about(name):
        if job.kind == "forgetting" and job.status == "done":
            rows: list[dict[str, Any]] = (job.result or {}).get("rows", [])
            return rows
    return []


def _jobs_about(name: str) -> list[Job]:
    found = [job for kind in KINDS for job in jobs.list(50, (), kind) if name and job.config.get("adapter") == name]
    return sorted(found, key=lambda job: -job.created)


def _kept_as(job: Job) -> str:
    if job.kind != "soften" or job.status != "done":
        return ""
    result = job.result or {}
    names = f"'{result.get('library')}' and (the control) '{result.get('library_control')}'"
    return markup.notice(f"In your library as {names}.", "info")
