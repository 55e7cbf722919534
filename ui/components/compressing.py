"""Make a language model smaller: a method with its fields, an estimate, the job, and the new base layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio import jobs, library
from studio.cli.output import size
from studio.compression import advice, command, layers
from studio.jobs import Job, kinds
from studio.training.schemas.language import TrainLanguageConfig
from ui import markup
from ui.components import job_panel, layer_bars, loss_plot, method_help, rows_file, schema_form
from ui.errors import errors_shown
from ui.events import PRIVATE

SECONDS = 1.0
FIRST = "lq"
"""The method that is chosen at first: it needs nothing but a base."""
USUAL = ("data", "name", "validation_split", "steps", "rank", "learning_rate", "batch_size", "max_length")
"""Fields of a training that are shown beside a method's own."""
_CANCEL = "Cancel"
_EMPTY = markup.empty(
    "The smaller base appears here",
    "Choose a method and how small it should be. The result goes into your library; a stopped job can be resumed.",
)

Form = dict[str, gr.components.Component]


@dataclass
class Settings:
    """The left side."""

    method: gr.Radio
    told: gr.HTML
    forms: dict[str, Form]
    """Method -> its widgets by field, without the base."""
    drop: gr.File
    preview: gr.HTML
    estimate: gr.Button
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


def draw_settings(base: str = "") -> Settings:
    """Draw the method and its fields inside the current column.

    Args:
        base: the language model that is chosen at first.
    """
    found = kinds.compressions()
    with gr.Group(elem_classes="as-card"):
        method = gr.Radio([(kind.title, name) for name, kind in found.items()], value=FIRST, label="Method",
                          elem_classes="as-choices", elem_id="compress-method")  # fmt: skip
        told = gr.HTML(elem_classes="as-help", elem_id="compress-told", apply_default_css=False)
        gr.on(None, lambda: _told(FIRST) + _help(advice.of(base, rows=False)), None, told, **PRIVATE)  # at the start
    with gr.Group(elem_classes="as-card", visible="data" in schema_form.fields(found[FIRST].model())) as rows:
        gr.HTML(markup.heading("Rows", "Text of the kind the model is for: conversations, prompts or plain texts."),
                apply_default_css=False)  # fmt: skip
        drop = gr.File(label="Drop a file here", file_types=rows_file.TYPES, height=110, elem_id="compress-drop",
                       show_label=False)  # fmt: skip
        preview = gr.HTML("", elem_id="compress-preview", apply_default_css=False)
    forms: dict[str, Form] = {}
    areas: list[gr.Column] = []
    for name, kind in found.items():
        with gr.Column(visible=name == FIRST, elem_classes="as-form") as area:
            forms[name] = _form(name, kind)
        areas.append(area)
    with gr.Row(elem_classes="as-actions"):
        estimate = gr.Button("Estimate", elem_id="compress-estimate", scale=1)
        start = gr.Button("Make it smaller", variant="primary", elem_id="compress-start", scale=2)
    method.change(
        lambda chosen: [_told(chosen), gr.update(visible="data" in forms[chosen]),
                        *(gr.update(visible=name == chosen) for name in found)],
        method, [told, rows, *areas], **PRIVATE,
    )  # fmt: skip
    return Settings(method, told, forms, drop, preview, estimate, start)


def _form(method: str, kind: kinds.Kind) -> Form:
    """Draw the fields of a method: its own and the usual ones of a training first, the others by group."""
    known = schema_form.fields(kind.model())
    hidden = {"base", *command.fixed(kind)}
    hidden |= {name for name, (decides, _) in method_help.OPTIONS.items() if decides in hidden}
    training = set(TrainLanguageConfig.model_fields) if issubclass(kind.model(), TrainLanguageConfig) else set()
    own = [name for name, item in known.items() if not item.advanced and name not in training]
    own.sort(key=lambda name: known[name].group == "Data")
    usual = [name for name in USUAL if name in training]
    form: Form = {}

    def add(name: str, **more: Any) -> None:
        form[name] = schema_form.widget(known[name], elem_id=f"compress-{method}-{name}", **more)

    with gr.Group(elem_classes="as-card"):
        for name in (name for name in (*own, *usual) if name not in hidden):
            add(name, **({"placeholder": "or drop a file above"} if name == "data" else {}))
    for group, names in schema_form.groups(known, [*form, *hidden]).items():
        with gr.Accordion(group, open=False, elem_classes="as-more"):
            place = gr.Column() if group == "Method" else None
            for name in names:
                if place:
                    form[name] = method_help.widget(known[name], f"compress-{method}")
                else:
                    add(name)
        if place:
            with place:
                method_help.watch(form, known, f"compress-{method}")
    return form


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

    datas: list[Any] = [form["data"] for form in settings.forms.values() if "data" in form]

    @errors_shown
    def estimate(method: str, base: str, *values: Any) -> Any:
        return [_forecast(config_of(settings.forms, method, base, values)), ""]

    @errors_shown
    def dropped(file: str | None) -> Any:
        if not file:
            return ["", *[""] * len(datas)]
        kept = rows_file.keep(file)
        return [rows_file.describe(kept, "causal"), *[str(kept)] * len(datas)]

    def advised(method: str, base: str, *given: str) -> str:
        return _told(method) + _help(advice.of(base, any(given)))

    @errors_shown
    def begin(method: str, base: str, *values: Any) -> Any:
        config = config_of(settings.forms, method, base, values)
        job_id = jobs.submit(config.kind, config)
        jobs.ensure_worker()
        return follow(job_id)

    def gone() -> list[Any]:
        return ["", gr.Timer(active=False), _EMPTY, "", *[gr.update(visible=False)] * 3]

    asked = [settings.method, base, *settings.widgets]
    settings.drop.change(dropped, settings.drop, [settings.preview, *datas], **PRIVATE)
    for changed in (base.change, *(data.change for data in datas), settings.method.change):
        changed(advised, [settings.method, base, *datas], settings.told, **PRIVATE)
    settings.estimate.click(estimate, asked, [result.panel, result.picture], **PRIVATE)
    settings.start.click(begin, asked, result.view, **PRIVATE)
    job_panel.steer(job_panel.Area(result.job, result.timer, result.cancel, result.view, result.resume), follow, gone)


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


def _help(sentence: str) -> str:
    return f"<p>{markup.text(sentence)}</p>" if sentence else ""


def _told(name: str) -> str:
    return _help(kinds.compressions()[name].help)


def _forecast(config: Any) -> str:
    """What the form's job will need and give, before it runs."""
    from studio.compression.estimate import told
    from studio.processes import apart

    found = apart(told, config)
    return (
        '<section id="compress-estimated" aria-label="Estimate">' + markup.heading("Before it runs", found.advice)
        + markup.facts(found.facts) + layer_bars.of(found.layers) + "</section>"
    )  # fmt: skip


def follow(job_id: str, shown: tuple[Any, ...] = ()) -> Any:
    """The right side for a job."""
    if not job_id:
        return gr.skip()
    job = jobs.get(job_id)
    return [
        job.id, gr.Timer(active=job.active), job_panel.job_panel(job, job_panel.ahead(job)) + _facts(job),
        loss_plot.of_job(job) + layer_bars.of(layers.of_job(job.result) if job.status == "done" else []),
        gr.update(visible=job.active, value="Stop now" if job.status == "cancelling" else _CANCEL),
        gr.update(visible=job.status in ("cancelled", "interrupted", "failed")),
        gr.update(visible=made(job) is not None),
    ]  # fmt: skip


def made(job: Job) -> tuple[library.Record, list[str]] | None:
    """The base to talk to when a job is done, and the adapters on it; None if they are not in the library."""
    result = job.result or {}
    if job.status != "done" or "library" not in result:
        return None
    if any(record.name == result["library"] for record in library.adapters()) and "adapter" in result:
        wanted, adapters = str(job.config.get("base", "")), [str(result["library"])]
    else:
        wanted, adapters = str(result["library"]), []
    found = next((record for record in library.bases() if record.name == wanted), None)
    return None if found is None else (found, adapters)


def _facts(job: Job) -> str:
    result = job.result or {}
    if job.status != "done" or "library" not in result:
        return ""
    ratios = result.get("ratios") or {}
    kept = f"{ratios['small'] / 1e6:.4g} of {ratios['whole'] / 1e6:.4g} million" if ratios else ""
    files = f"{size(result['bytes'])} instead of {size(result['base_bytes'])}" if "base_bytes" in result else ""
    pair = f"{result['error']:.4g} / {result['plain']:.4g}" if result.get("plain") else ""
    losses = [(f"Loss, {name.replace('_', ' + ')}", f"{loss:.4f}") for name, loss in result.get("losses", {}).items()]
    return markup.notice(f"In your library as '{result['library']}'.", "info") + markup.facts([
        ("Bits per weight", result.get("bits")), ("Parameters", kept), ("Files in 16 bits" if kept else "Files", files),
        ("Error with and without the low-rank part", pair), *losses,
    ])  # fmt: skip
