"""The safety audit of a language adapter on the Library page: your prompts in, the verdict and the report out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio import jobs
from studio.audit import records
from studio.jobs import Job
from studio.library import Record
from ui import dropped, markup
from ui.components import rows_file
from ui.components.inspected import base_choice, chosen_adapter
from ui.components.job_panel import Area, ahead, job_panel, steer
from ui.errors import errors_shown
from ui.events import PRIVATE

SECONDS = 1.0
TONES = {"pass": "good", "fail": "bad", "inconclusive": "soft"}
TAGS = {"pass": "audit passed", "fail": "audit failed", "inconclusive": "audit inconclusive"}


@dataclass
class Auditing:
    """The accordion, what is asked for, and the job."""

    fold: gr.Accordion
    base: gr.Dropdown
    harmful: gr.File
    benign: gr.File
    unaligned: gr.Dropdown
    start: gr.Button
    screen: gr.Button
    job: gr.State
    shown: gr.State
    timer: gr.Timer
    panel: gr.HTML
    cancel: gr.Button

    @property
    def view(self) -> list[Any]:
        return [self.job, self.shown, self.timer, self.panel, self.cancel]


def draw() -> Auditing:
    """Draw it inside the current column, hidden until a language adapter is chosen."""
    with gr.Accordion("Safety audit", open=False, visible=False, elem_classes="as-more", elem_id="audit") as fold:
        gr.HTML(
            "<p>Does the adapter refuse less than its base, refuse harmless requests, or know less? Both are asked the "
            "same. Requests that should be refused are yours to bring; none is shipped. They stay on this computer, "
            "and no report holds their text.</p>", elem_classes="as-help", apply_default_css=False,
        )  # fmt: skip
        base = gr.Dropdown([], label="Base it was trained on", allow_custom_value=True, interactive=True,
                           elem_id="audit-base")  # fmt: skip
        harmful = gr.File(label="Requests that should be refused", file_count="multiple",
                          file_types=rows_file.TYPES, height=110, elem_id="audit-harmful")  # fmt: skip
        benign = gr.File(label="Requests that should be answered (optional)", file_count="multiple",
                         file_types=rows_file.TYPES, height=110, elem_id="audit-benign")  # fmt: skip
        unaligned = gr.Dropdown(
            [], label="The base before its alignment (optional)", allow_custom_value=True, interactive=True,
            info="the pre-trained model of a chat model: its weights tell which changes undo the alignment",
            elem_id="audit-unaligned",
        )  # fmt: skip
        with gr.Row():
            start = gr.Button("Audit", variant="primary", size="md", elem_id="audit-start")
            screen = gr.Button("Screen the weights only", size="md", elem_id="audit-screen")
        job, shown, timer = gr.State(""), gr.State(()), gr.Timer(SECONDS, active=False)
        panel = gr.HTML("", elem_id="audit-panel", apply_default_css=False)
        cancel = gr.Button("Cancel", variant="stop", visible=False, size="md", elem_id="audit-cancel")
    return Auditing(fold, base, harmful, benign, unaligned, start, screen, job, shown, timer, panel, cancel)


def wire(auditing: Auditing, chosen: gr.State, shelf: gr.Radio) -> None:
    """Show it for the chosen language adapter; start and follow its audit."""

    @errors_shown
    def offer(name: str, shown: str) -> Any:
        record = chosen_adapter(name, shown)
        if record is None or record.family != "language":
            return [gr.update(visible=False), gr.skip(), gr.skip(), *follow("", ())]
        bases = base_choice(record, lambda base: base.family == "language")
        last = jobs.list(50, (), "audit")
        mine = next((job.id for job in last if job.config.get("adapter") == name), "")
        return [gr.update(visible=True), bases, gr.update(choices=bases["choices"]),
                *follow(mine, ())]  # fmt: skip

    def begin(
        screen_only: bool, name: str, base: str | None, harmful: list[str] | None, benign: list[str] | None,
        unaligned: str | None,
    ) -> Any:  # fmt: skip
        if not base:
            raise InputError("Choose the base that the adapter was trained on.")
        if not harmful and not screen_only:
            raise InputError("Drop a file of requests that should be refused, or screen the weights only.")
        values = {"adapter": name, "base": base, "unaligned": unaligned or "", "screen_only": screen_only}
        if not screen_only:
            values |= {"harmful": _kept(harmful), "benign": _kept(benign)}
        job_id = jobs.submit("audit", values)
        jobs.ensure_worker()
        return follow(job_id, ())

    a = auditing
    asked = [chosen, a.base, a.harmful, a.benign, a.unaligned]
    a.start.click(errors_shown(lambda *values: begin(False, *values)), asked, a.view, **PRIVATE)
    a.screen.click(errors_shown(lambda *values: begin(True, *values)), asked, a.view, **PRIVATE)
    steer(Area(a.job, a.timer, a.cancel, a.view, shown=a.shown), follow, lambda: follow("", ()))
    chosen.change(offer, [chosen, shelf], [a.fold, a.base, a.unaligned, *a.view], **PRIVATE)


def follow(job_id: str, shown: tuple[Any, ...]) -> list[Any]:
    """The view of a job, empty for none."""
    if not job_id:
        return ["", (), gr.Timer(active=False), "", gr.update(visible=False)]
    job = jobs.get(job_id)
    now = (job.id, job.status, job.progress.step if job.progress else 0)
    if now == tuple(shown) and job.status != "running":
        return [gr.skip()] * 5
    cancel = gr.update(visible=job.active, value="Stop now" if job.status == "cancelling" else "Cancel")
    return [job.id, now, gr.Timer(active=job.active), job_panel(job, ahead(job)) + result(job), cancel]


def result(job: Job) -> str:
    """The verdict of a finished audit, its limits, and its report."""
    if job.status != "done" or not job.result:
        return ""
    found = job.result
    rows = "".join(
        f"<tr><th scope=row>{markup.text(check['title'])}</th><td>{markup.tag(check['status'], TONES[check['status']])}"
        f"</td><td>{check['value']:+.1f} ({check['low']:+.1f} to {check['high']:+.1f})</td></tr>"
        for check in found["checks"]
    )
    table = (
        "<table class=as-table><thead><tr><th scope=col>limit</th><th scope=col></th>"
        f"<th scope=col>points (95 %)</th></tr></thead><tbody>{rows}</tbody></table>" if rows else ""
    )  # fmt: skip
    notes = "".join(f"<li>{markup.text(text)}</li>" for text in (*found["warnings"], *found["remarks"]))
    report = markup.text(markup.file_url(found["files"]["html"], job.created))
    return (
        f'<section class="as-audit"><p>Verdict {markup.tag(found["verdict"], TONES[found["verdict"]])} '
        f'<a href="{report}" target="_blank" rel="noopener">the whole report</a></p>{table}'
        f"{f'<ul>{notes}</ul>' if notes else ''}</section>"
    )


def verdict_tag(record: Record) -> str:
    """The verdict of the last audit of an adapter, for its card; empty if there is none."""
    found = records.latest(record.path) if record.kind == "adapter" and record.family == "language" else None
    return markup.tag(TAGS[found.verdict], TONES[found.verdict]) if found else ""


def _kept(uploads: Sequence[str] | None) -> list[str]:
    """Copies of dropped files, readable when the job runs."""
    return [str(dropped.keep(file, "audit")) for file in uploads or ()]
