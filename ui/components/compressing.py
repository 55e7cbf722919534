"""Make a language model smaller: a method with its fields, an estimate, the job, and the new base layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio import jobs, library
from studio.jobs import Job, kinds
from ui import markup
from ui.components import job_panel, schema_form
from ui.components.layer_bars import of_base
from ui.errors import errors_shown

SECONDS = 1.0
_PRIVATE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_CANCEL = "Cancel"
_EMPTY = markup.empty(
    "The smaller base appears here",
    "Choose a method and how small it should be. It becomes a base in your library; what was done can be resumed.",
)

Form = dict[str, gr.components.Component]


@dataclass
class Settings:
    """The left side."""

    method: gr.Radio
    forms: dict[str, Form]
    """Method -> its widgets by field, without the base."""
    estimate: gr.Button
    estimated: gr.HTML
    start: gr.Button

    @property
    def widgets(self) -> list[gr.components.Component]:
        """All fields of all methods, in order."""
        return [widget for form in self.forms.values() for widget in form.values()]


@dataclass
class Result:
    """The right side."""

    job: gr.State
    timer: gr.Timer
    panel: gr.HTML
    picture: gr.HTML
    cancel: gr.Button
    resume: gr.Button
    use: gr.Button

    @property
    def view(self) -> list[Any]:
        """Components that :func:`follow` fills."""
        return [self.job, self.timer, self.panel, self.picture, self.cancel, self.resume, self.use]


def draw_settings() -> Settings:
    """Draw the method and its fields inside the current column."""
    found = kinds.compressions()
    first = next(iter(found))
    with gr.Group(elem_classes="as-card"):
        method = gr.Radio([(kind.title, name) for name, kind in found.items()], value=first, label="Method",
                          elem_classes="as-choices", elem_id="compress-method")  # fmt: skip
        told = gr.HTML(_told(first), elem_classes="as-help", apply_default_css=False)
    forms: dict[str, Form] = {}
    areas: list[gr.Column] = []
    for name, kind in found.items():
        known = schema_form.fields(kind.model())
        form: Form = {}
        with gr.Column(visible=name == first, elem_classes="as-form") as area:
            with gr.Group(elem_classes="as-card"):
                for item in known.values():
                    if not item.advanced and item.name != "base":
                        form[item.name] = schema_form.widget(item, elem_id=f"compress-{name}-{item.name}")
            with gr.Accordion("Rarely needed", open=False, elem_classes="as-more"):
                for item in known.values():
                    if item.advanced and item.name != "base":
                        form[item.name] = schema_form.widget(item, elem_id=f"compress-{name}-{item.name}")
        forms[name] = form
        areas.append(area)
    with gr.Row(elem_classes="as-actions"):
        estimate = gr.Button("Estimate", elem_id="compress-estimate", scale=1)
        start = gr.Button("Make it smaller", variant="primary", elem_id="compress-start", scale=2)
    estimated = gr.HTML("", elem_id="compress-estimated", elem_classes="as-help", apply_default_css=False)
    method.change(
        lambda chosen: [_told(chosen), *(gr.update(visible=name == chosen) for name in found)], method, [told, *areas],
        **_PRIVATE,
    )  # fmt: skip
    return Settings(method, forms, estimate, estimated, start)


def draw_result() -> Result:
    """Draw progress and result inside the current column."""
    job = gr.State("")
    timer = gr.Timer(SECONDS, active=False)
    panel = gr.HTML(_EMPTY, elem_id="compress-panel", apply_default_css=False)
    with gr.Row(elem_classes="as-actions-row"):
        cancel = gr.Button(_CANCEL, variant="stop", visible=False, size="md", elem_id="compress-cancel")
        resume = gr.Button("Resume", visible=False, size="md", elem_id="compress-resume")
        use = gr.Button("Use it", variant="primary", visible=False, size="md", elem_id="compress-use")
    picture = gr.HTML("", elem_id="compress-picture", apply_default_css=False)
    return Result(job, timer, panel, picture, cancel, resume, use)


def wire(settings: Settings, result: Result, base: gr.Dropdown) -> None:
    """Connect both sides; ``base`` is the page's language model."""

    @errors_shown
    def estimate(method: str, base: str, *values: Any) -> Any:
        return _estimated(config_of(settings.forms, method, base, values))

    @errors_shown
    def begin(method: str, base: str, *values: Any) -> Any:
        config = config_of(settings.forms, method, base, values)
        job_id = jobs.submit(config.kind, config)
        jobs.ensure_worker()
        return follow(job_id)

    @errors_shown
    def look(job_id: str) -> Any:
        try:
            return follow(job_id)
        except InputError:  # deleted meanwhile
            return ["", gr.Timer(active=False), _EMPTY, "", *[gr.update(visible=False)] * 3]

    asked = [settings.method, base, *settings.widgets]
    settings.estimate.click(estimate, asked, settings.estimated, **_PRIVATE)
    settings.start.click(begin, asked, result.view, **_PRIVATE)
    result.timer.tick(look, result.job, result.view, **_PRIVATE)
    result.cancel.click(job_panel.stopper(follow), result.job, result.view, **_PRIVATE)
    result.resume.click(job_panel.resumer(follow), result.job, result.view, **_PRIVATE)


def config_of(forms: dict[str, Form], method: str, base: str, values: Sequence[Any]) -> Any:
    """The job of the filled form of ``method``; ``values`` are of all forms, in order.

    Raises:
        InputError: what cannot work.
    """
    kind, start = kinds.compressions()[method], 0
    for name, form in forms.items():
        if name == method:
            break
        start += len(form)
    names = list(forms[method])
    known = schema_form.fields(kind.model())
    read = schema_form.read_all(known, names, values[start : start + len(names)])
    config = kind.model().parse({**read, "base": base}, source="the form")
    kind.check(config)
    return config


def _told(name: str) -> str:
    return f"<p>{markup.text(kinds.compressions()[name].help)}</p>"


def _estimated(config: Any) -> str:
    """Bytes and what to expect, where the method can say it before it runs."""
    if config.kind != "compress-lq":
        return markup.notice("The size of this method's result is known when it has run.", "info")
    from studio.compression.estimate import apart

    found = apart(config)
    return markup.facts([
        ("Files", f"{found.bytes / 1e6:.0f} MB instead of {found.base_bytes / 1e6:.0f}"),
        ("Matrices", f"{found.matrices / 1e6:.0f} MB at {found.bits:.2f} bits"),
        ("Low-rank part", f"{found.low_rank / 1e6:.0f} MB"),
        ("The rest", f"{found.rest / 1e6:.0f} MB"),
    ]) + f"<p>{markup.text(found.advice)}</p>"  # fmt: skip


def follow(job_id: str, shown: tuple[Any, ...] = ()) -> Any:
    """The right side for a job."""
    if not job_id:
        return gr.skip()
    job = jobs.get(job_id)
    return [
        job.id, gr.Timer(active=job.active), job_panel.job_panel(job, job_panel.ahead(job)) + _facts(job),
        of_base(str((job.result or {}).get("path", ""))) if job.status == "done" and (job.result or {}).get("path")
        else "",
        gr.update(visible=job.active, value="Stop now" if job.status == "cancelling" else _CANCEL),
        gr.update(visible=job.status in ("cancelled", "interrupted", "failed")),
        gr.update(visible=made(job) is not None),
    ]  # fmt: skip


def made(job: Job) -> library.Record | None:
    """The base that a finished job brought into the library; None if there is none (any more)."""
    name = (job.result or {}).get("library") if job.status == "done" else None
    return next((record for record in library.bases() if record.name == name), None)


def _facts(job: Job) -> str:
    result = job.result or {}
    if job.status != "done" or "library" not in result:
        return ""
    figures = [("Bits per weight", result.get("bits"))]
    if "base_bytes" in result:
        figures.append(("Files", f"{result['bytes'] / 1e6:.0f} MB instead of {result['base_bytes'] / 1e6:.0f}"))
    if result.get("plain"):
        figures.append(("Error with and without the low-rank part", f"{result['error']:.4g} / {result['plain']:.4g}"))
    return markup.notice(f"In your library as '{result['library']}'.", "info") + markup.facts(figures)
