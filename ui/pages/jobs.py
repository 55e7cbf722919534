"""Jobs: waiting, running and ended ones; inspect, cancel, resume, run again, delete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import yaml

from adapters.errors import InputError
from studio import catalogue, jobs
from studio.composition import comparison, gallery, moving
from studio.jobs import Job, kinds
from studio.schema import JobConfig
from ui import markup, pictures
from ui.components import job_panel, training_run
from ui.components.pick_list import pick_list, picked
from ui.errors import errors_shown
from ui.events import PRIVATE
from ui.pages import compose, train

SECONDS = 1.5
MOST = 100
LONGEST = 120
"""Characters of a setting's value in the table."""
FILTERS = [("All", "all"), ("Running", "active"), ("Ended", "ended")]


@dataclass
class Page:
    """What the app and other pages need."""

    timer: gr.Timer
    chosen: gr.State
    open: gr.Button
    refresh_inputs: list[Any]
    refresh_outputs: list[Any]


def build() -> Page:
    """Draw the page inside the current tab."""
    chosen, shown = gr.State(""), gr.State(())
    timer = gr.Timer(SECONDS, active=False)
    with gr.Row(elem_classes="as-page"):
        with gr.Column(scale=6, min_width=320):
            filters = gr.Radio(FILTERS, value="all", show_label=False, label="Which jobs", elem_classes="as-choices",
                               container=False)  # fmt: skip
            rows = pick_list(elem_id="jobs-list")
        with gr.Column(scale=6, min_width=320, elem_id="jobs-detail", elem_classes="as-side"):
            detail = _Detail.draw()
    page = Page(timer, chosen, detail.open, [chosen, filters, shown], [rows, chosen, shown, *detail.view])
    _wire(page, rows, filters, detail)
    return page


@dataclass
class _Detail:
    panel: gr.HTML
    actions: gr.Row
    open: gr.Button
    cancel: gr.Button
    resume: gr.Button
    rerun: gr.Button
    delete: gr.Button
    mates: gr.CheckboxGroup
    together: gr.Button
    gallery: gr.Gallery
    log: gr.HTML

    @classmethod
    def draw(cls) -> _Detail:
        panel = gr.HTML("", elem_id="jobs-panel", apply_default_css=False)
        with gr.Row(visible=False, elem_classes="as-actions-row") as actions:
            open_ = gr.Button("Open", variant="primary", size="md", elem_id="job-open")
            cancel = gr.Button("Cancel", variant="stop", size="md", visible=False, elem_id="job-cancel")
            resume = gr.Button("Resume", size="md", visible=False, elem_id="job-resume")
            rerun = gr.Button("Run again", size="md", elem_id="job-rerun")
            delete = gr.Button("Delete", variant="stop", size="md", visible=False, elem_id="job-delete")
        mates = gr.CheckboxGroup([], label="One base, several adapters at once: train it together with", visible=False,
                                 elem_id="job-mates")  # fmt: skip
        together = gr.Button("Train together", size="md", visible=False, elem_id="job-together")
        gallery = gr.Gallery(label="Pictures", show_label=False, columns=4, height="auto", object_fit="contain",
                             visible=False, interactive=False)  # fmt: skip
        log = gr.HTML("", elem_id="job-log", apply_default_css=False)
        return cls(panel, actions, open_, cancel, resume, rerun, delete, mates, together, gallery, log)

    @property
    def view(self) -> list[Any]:
        return [
            self.panel, self.actions, self.open, self.cancel, self.resume, self.delete, self.mates, self.together,
            self.gallery, self.log,
        ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ what is shown


def show(chosen: str, which: str, shown: tuple[Any, ...]) -> Any:
    """The list and the details; parts that equal ``shown`` are left alone, so that nothing flickers."""
    listed = _listed(which)
    job = next((job for job in listed if job.id == chosen), None)
    drawn = "".join(row(item, item.id == chosen) for item in listed)
    drawn = f'<div class="as-jobs">{drawn}</div>' if drawn else _nothing(which)
    drawn = "".join(markup.notice(text, "error") for text in jobs.trouble()) + drawn
    log = jobs.log(job.id, tail=200) if job else ""
    made = pictures_of(job) if job else []
    mates = list(jobs.mates(job.id)) if job else []
    names = [mate.id for mate in mates]
    now = (drawn, job.status if job else "", log, names, job.id if job else "", made)
    if now == tuple(shown):
        return gr.skip()
    same_pictures = bool(shown) and now[-2:] == tuple(shown)[-2:]
    gallery = gr.skip() if same_pictures else gr.update(visible=bool(made), value=made)
    return [drawn, job.id if job else "", now, *_detail(job, mates), gallery, _log(log)]


def _listed(which: str) -> list[Job]:
    wanted: Any = {"active": jobs.ACTIVE, "ended": jobs.ENDED}.get(which, ())
    return jobs.list(MOST, wanted)


def _nothing(which: str) -> str:
    if which == "active":
        return markup.empty("Nothing is running", "Start on Compose or Train. Jobs survive closing the page.")
    return markup.empty("No jobs yet", "Every picture and every training run is a job: start one on Compose or Train.")


def row(job: Job, chosen: bool) -> str:
    """One job as a row of the list."""
    progress = job.progress
    bar = ""
    if job.status in ("running", "cancelling") and progress and progress.fraction is not None:
        bar = f'<span class="as-bar small"><i style="width:{round(progress.fraction * 100)}%"></i></span>'
    when = markup.ago(job.finished or job.started or job.created)
    kind = kinds.title(job.kind)
    doing = job_panel.stage(job) if job.active else job_panel.timing(job)
    small = " · ".join(filter(None, [when, doing, *how(job)]))
    title = markup.text(job_panel.job_title(job))
    return (
        f'<button type="button" class="as-job-row{" chosen" if chosen else ""}" data-pick="{markup.text(job.id)}" '
        f'aria-pressed="{str(chosen).lower()}">{_face(job)}<span class="kind">{markup.text(kind)}</span>'
        f'<span class="body"><strong>{title}</strong><small>{markup.text(small)}</small>'
        f"{bar}</span>{job_panel.status_tag(job)}</button>"
    )


def how(job: Job) -> list[str]:
    """Method and seed of a job that makes pictures, as text."""
    if job.kind not in gallery.KINDS:
        return []
    methods = job.config.get("methods") or [job.config.get("method", "")]
    return [", ".join(comparison.title(str(name)) for name in methods), f"seed {job.config.get('seed', 0)}"]


def _face(job: Job) -> str:
    """A thumbnail of the job's result, or an empty space."""
    file = _first(job)
    if file is None:
        return '<span class="face" aria-hidden="true"></span>'
    return f'<img class="face" alt="" loading="lazy" src="{markup.text(markup.file_url(pictures.thumbnail(file)))}">'


def _first(job: Job) -> Path | None:
    if job.kind in gallery.KINDS:
        return next(iter(gallery.files_of(job)), None)
    if job.kind in ("train-image", "distill"):
        return max(job.folder.glob("samples/**/step-*.png"), key=lambda file: file.stat().st_mtime, default=None)
    named = (job.result or {}).get("picture")
    return Path(named) if named and Path(named).is_file() else None


def _detail(job: Job | None, mates: list[Job]) -> list[Any]:
    """The panel and which actions it offers."""
    if job is None:
        return [
            markup.empty("Choose a job", "Its settings, pictures and log show here."),
            *[gr.update(visible=False)] * 7,
        ]
    return [
        describe(job),
        gr.update(visible=True),
        gr.update(visible=job.kind in job_panel.VIEWS),
        gr.update(visible=job.active, value="Stop now" if job.status == "cancelling" else "Cancel"),
        gr.update(visible=job.status in ("failed", "cancelled", "interrupted")),
        gr.update(visible=not job.active or job.status == "queued"),
        gr.update(visible=bool(mates), choices=[(f"{job_panel.job_title(m)} ({m.id})", m.id) for m in mates],
                  value=[mate.id for mate in mates]),
        gr.update(visible=bool(mates)),
    ]  # fmt: skip


def pictures_of(job: Job) -> list[Any]:
    """The pictures a job has made, whatever its kind."""
    if job.kind in ("train-image", "distill"):
        return list(train.samples(job)[:8])
    made = compose.made(job)
    if len(made) == 1 and moving.video_of(made[0]):  # it plays in the panel already
        return []
    return compose.captioned(job, made)


def describe(job: Job) -> str:
    """Title, state, picture, facts, and settings that differ from the defaults."""
    pairs = [
        ("Kind", kinds.title(job.kind)), ("Method", method(job)), ("Seed", job.config.get("seed", "")),
        ("Created", markup.ago(job.created)), ("Took", markup.duration(job.seconds)), ("Device", job.device),
        ("Together with", ", ".join(job_panel.job_title(o) for o in jobs.packed(job.id) if o.id != job.id)),
        ("Host", job.host), ("Id", job.id), ("Folder", job.folder),
    ]  # fmt: skip
    face = _first(job)
    picture = _picture(face) if face else ""
    return (
        f'<article class="as-detail"><h2>{markup.text(job_panel.job_title(job))}</h2>'
        f"{job_panel.job_panel(job, job_panel.ahead(job))}{picture}{training_run.pair(job)}"
        f"{markup.facts([pair for pair in pairs if pair[1] != ''])}"
        f"{_changed(job)}{_configuration(job)}</article>"
    )


def _picture(file: Path) -> str:
    return markup.shown(file, moving.video_of(file), "The latest picture", "as-preview")


def method(job: Job) -> str:
    """A job's methods: those of a composition, or how a training's adapter starts and learns."""
    if job.kind in gallery.KINDS:
        return how(job)[0]
    chosen = [
        str(job.config[choice.key])
        for choice in catalogue.choices()
        if choice.slot is not None and job.config.get(choice.key, choice.slot.off) != choice.slot.off
    ]
    plain = [str(job.config[key]) for key in ("preset", "objective", "task", "mode") if job.config.get(key)]
    return ", ".join([*plain, *chosen])


def _changed(job: Job) -> str:
    """The settings that differ from the defaults, as a table."""
    model = kinds.find(job.kind).model()
    usual, short = model.defaults(), _without_defaults(model, job.config)
    rows = "".join(
        f"<tr><th scope=row>{markup.text(name.replace('_', ' '))}</th>"
        f"<td>{markup.text(_plain(short.get(name, value)))}</td>"
        f"<td>{markup.text(_plain(usual[name])) if name in usual else ''}</td></tr>"
        for name, value in job.config.items() if value != usual.get(name, ...)
    )  # fmt: skip
    return (
        '<table class="as-changed"><thead><tr><th>Setting</th><th>Here</th><th>Usually</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _without_defaults(model: type[JobConfig], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What differs from the defaults, also inside adapters and regions; all of what is not valid any more."""
    try:
        short: Mapping[str, Any] = model.parse(config).model_dump(mode="json", exclude_defaults=True)
    except InputError:
        return config
    return short


def _plain(value: Any) -> str:
    """A value on one line, cut if it is long."""
    written = _words(value) or "–"
    return written if len(written) <= LONGEST else written[: LONGEST - 1] + "…"


def _words(value: Any) -> str:
    """A value in words: an adapter or region as its name and what was set for it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        name = value.get("name", "")
        parts = {key: _words(part) for key, part in value.items() if key != "name"}
        told = [f"{key.replace('_', ' ')} {part}" for key, part in parts.items() if part and part != name]
        return ", ".join([name, *told] if name else told)
    if isinstance(value, list | tuple):
        return ("; " if any(isinstance(part, Mapping) for part in value) else ", ").join(map(_words, value))
    return str(value).strip()


def _configuration(job: Job) -> str:
    """The whole configuration, to read, and where its file is; no download, because it names places on this disk."""
    settings = yaml.safe_dump(job.config, sort_keys=False, allow_unicode=True)
    return (
        "<details><summary>Configuration</summary><p>To repeat the job, use config.yaml in its folder.</p>"
        f"<pre tabindex=0>{markup.text(settings)}</pre></details>"
    )


def _log(log: str) -> str:
    if not log:
        return ""
    return f'<section class="as-log"><h3>Log</h3><pre tabindex="0" aria-label="Log">{markup.text(log)}</pre></section>'


# ------------------------------------------------------------------------------------------------ what happens


def _wire(page: Page, rows: gr.HTML, filters: gr.Radio, detail: _Detail) -> None:
    @errors_shown
    def choose(which: str, event: gr.EventData) -> Any:
        return show(picked(event), which, ())

    @errors_shown
    def cancel(chosen: str, which: str) -> Any:
        jobs.cancel(chosen)
        return show(chosen, which, ())

    @errors_shown
    def resume(chosen: str, which: str) -> Any:
        jobs.resume(chosen)
        jobs.ensure_worker()
        return show(chosen, which, ())

    @errors_shown
    def rerun(chosen: str, which: str) -> Any:
        new = jobs.rerun(chosen)
        jobs.ensure_worker()
        return show(new, which, ())

    @errors_shown
    def together(chosen: str, mates: list[str], which: str) -> Any:
        if not mates:
            raise InputError("Choose the jobs that are trained together with this one.")
        jobs.together([chosen, *mates])
        jobs.ensure_worker()
        return show(chosen, which, ())

    @errors_shown
    def delete(chosen: str, which: str) -> Any:
        if not chosen:
            return gr.skip()
        jobs.delete(chosen)
        return show("", which, ())

    rows.select(choose, filters, page.refresh_outputs, **PRIVATE)
    rows.select(None, None, None, js=_TO_DETAIL)
    filters.input(errors_shown(show), page.refresh_inputs, page.refresh_outputs, **PRIVATE)
    page.timer.tick(errors_shown(show), page.refresh_inputs, page.refresh_outputs, **PRIVATE)
    for button, action in ((detail.cancel, cancel), (detail.resume, resume), (detail.rerun, rerun)):
        button.click(action, [page.chosen, filters], page.refresh_outputs, **PRIVATE)
    detail.together.click(together, [page.chosen, detail.mates, filters], page.refresh_outputs, **PRIVATE)
    detail.delete.click(delete, [page.chosen, filters], page.refresh_outputs, js=_SURE, **PRIVATE)


_TO_DETAIL = """() => { if (window.innerWidth < 760)
  document.getElementById('jobs-detail')?.scrollIntoView({behavior: 'smooth', block: 'start'}); }"""

_SURE = """(chosen, which) =>
  [window.confirm('Delete this job with everything it made?') ? chosen : '', which]"""
