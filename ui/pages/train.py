"""Train: drop pictures, say what they show, get an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio import jobs, library
from studio.jobs import Job
from studio.schemas.train_image import TrainImageConfig
from studio.training.presets import PRESETS
from ui import markup, pictures
from ui.components import job_panel, loss_plot, schema_form
from ui.pages import compose
from ui.pictures import Item
from ui.polite import polite, say
from ui.theme import script

KNOWN = schema_form.fields(TrainImageConfig)
NAMES = tuple(KNOWN)

MAIN = ("name", "trigger", "instance_prompt", "base", "steps", "rank", "learning_rate", "batch_size", "resolution",
        "sample_prompts", "sample_every")  # fmt: skip
"""Fields shown at once; ``mode`` and ``data`` are the cards on top, the rest stands in groups below."""

KINDS = [("A concept", "concept"), ("A style", "style"), ("A captioned set", "captioned")]
LENGTHS = [("Quick try", "quick"), ("Normal", "normal")]
FIRST_PRESET = "concept-normal"
SECONDS = 1.0

Form = dict[str, Any]


@dataclass
class Page:
    """What other pages may fill."""

    form: Form
    job: gr.State
    try_it: gr.Button
    view: list[Any]
    """Components that :func:`follow` fills."""


def build() -> Page:
    """Draw the page inside the current tab."""
    with gr.Row(elem_classes="as-page"):
        with gr.Column(scale=6, min_width=320, elem_classes="as-form"):
            drop, captions = _picture_card()
            form = _settings()
            with gr.Row(elem_classes="as-actions"):
                start = gr.Button("Start training", variant="primary", elem_id="train-start", scale=3)
        with gr.Column(scale=6, min_width=320, elem_id="train-result"):
            result = _Result.draw()
    _wire_pictures(drop, captions)
    _wire_run(form, captions, start, result)
    return Page(form, result.job, result.try_it, result.view)


# ------------------------------------------------------------------------------------------------ the form


def _picture_card() -> tuple[gr.File, gr.HTML]:
    with gr.Group(elem_classes="as-card"):
        gr.HTML(markup.heading("Pictures", "Five to twenty work well. Captions may come along as .txt files."),
                apply_default_css=False)  # fmt: skip
        drop = gr.File(
            label="Drop pictures here", file_count="multiple", file_types=["image", ".txt"], height=120,
            elem_id="train-drop", show_label=False,
        )  # fmt: skip
        captions = gr.HTML(
            [], html_template='<ul class="as-captions" aria-label="Training pictures" hidden></ul>',
            js_on_load=script("captions"), apply_default_css=False, elem_id="captions",
        )  # fmt: skip
    return drop, captions


def _settings() -> Form:
    form: Form = {}
    with gr.Group(elem_classes="as-card"):
        form["mode"] = gr.Radio(KINDS, value=KNOWN["mode"].default, label="What the pictures show",
                                elem_classes="as-choices", elem_id="train-mode")  # fmt: skip
        length = gr.Radio(LENGTHS, value="normal", label="How long", elem_classes="as-choices", elem_id="train-length")
        with gr.Row():
            form["name"] = schema_form.widget(KNOWN["name"], value="my-adapter", elem_id="train-name", min_width=150)
            form["trigger"] = schema_form.widget(KNOWN["trigger"], elem_id="train-trigger", min_width=150)
        form["instance_prompt"] = schema_form.widget(KNOWN["instance_prompt"])
    with gr.Group(elem_classes="as-card"):
        form["base"] = gr.Dropdown(
            compose.base_choices(), value=KNOWN["base"].default, label="Base model", info=KNOWN["base"].help,
            allow_custom_value=True, interactive=True,
        )  # fmt: skip
        for pair in (("steps", "rank"), ("learning_rate", "batch_size")):
            with gr.Row():
                for name in pair:
                    form[name] = _widget(name, elem_id=f"train-{name}", min_width=150)
        form["resolution"] = schema_form.widget(KNOWN["resolution"])
        form["sample_prompts"] = schema_form.widget(KNOWN["sample_prompts"], elem_id="train-samples")
        form["sample_every"] = schema_form.widget(KNOWN["sample_every"], elem_id="train-sample-every")
    with gr.Accordion("Pictures from a folder of this computer", open=False, elem_classes="as-more"):
        form["data"] = schema_form.widget(KNOWN["data"], value="", elem_id="train-data")
    for group, names in groups(form).items():
        with gr.Accordion(group, open=False, elem_classes="as-more"):
            for name in names:
                form[name] = _widget(name)
    for chooser in (form["mode"], length):
        chooser.input(preset_values, [form["mode"], length], [form[name] for name in PRESET_FIELDS],
                      show_progress="hidden", api_visibility="private")  # fmt: skip
    return form


def _widget(name: str, **options: Any) -> gr.components.Component:
    """The widget of a field, at the value of the preset that is chosen first."""
    value = PRESETS[FIRST_PRESET].get(name, KNOWN[name].default)
    return schema_form.widget(KNOWN[name], value=schema_form.show(KNOWN[name], value), **options)


def groups(shown: Mapping[str, Any]) -> dict[str, list[str]]:
    """The fields not in ``shown`` by the group of the schema, those that are needed often first."""
    found: dict[str, list[str]] = {}
    for item in sorted(KNOWN.values(), key=lambda item: item.advanced):
        if item.name not in shown:
            found.setdefault(item.group, []).append(item.name)
    order = list(dict.fromkeys(item.group for item in KNOWN.values() if item.group != "Base model"))
    found = {group: found[group] for group in [*order, "Base model"] if group in found}
    return {"Model and device" if group == "Base model" else group: names for group, names in found.items()}


PRESET_FIELDS = tuple(sorted({name for values in PRESETS.values() for name in values} - {"mode"}))


def preset_values(mode: str, length: str) -> list[Any]:
    """Widget values of :data:`PRESET_FIELDS` for a kind and length of training."""
    values = PRESETS[f"{mode}-{length}"]
    return [schema_form.show(KNOWN[name], values.get(name, KNOWN[name].default)) for name in PRESET_FIELDS]


# ------------------------------------------------------------------------------------------------ pictures


def _wire_pictures(drop: gr.File, captions: gr.HTML) -> None:
    @polite
    def dropped(files: list[str] | None, present: list[Item]) -> Any:
        items, problems = pictures.receive(files or (), present)
        if problems:
            say(" ".join(problems), title="Left out")
        return None, items

    drop.upload(dropped, [drop, captions], [drop, captions], show_progress="hidden", api_visibility="private")


# ------------------------------------------------------------------------------------------------ the run


@dataclass
class _Result:
    """The right side: progress, loss, samples, what to do with the adapter."""

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

    @classmethod
    def draw(cls) -> _Result:
        job, shown, adapter = gr.State(""), gr.State(()), gr.State("")
        timer = gr.Timer(SECONDS, active=False)
        panel = gr.HTML(_EMPTY, elem_id="train-panel", apply_default_css=False)
        with gr.Row(elem_classes="as-actions-row"):
            cancel = gr.Button("Cancel and keep what is learnt", variant="stop", visible=False, size="md",
                               elem_id="train-cancel")  # fmt: skip
            resume = gr.Button("Resume", visible=False, size="md", elem_id="train-resume")
        with gr.Row(visible=False, elem_classes="as-actions-row", elem_id="train-done") as done:
            try_it = gr.Button("Try it in Compose", variant="primary", size="md", elem_id="try-it")
            keep = gr.Button("Add to library", size="md", elem_id="keep")
            download = gr.DownloadButton("Download", size="md")
        plot = gr.HTML("", elem_id="loss-plot", apply_default_css=False)
        samples = gr.Gallery(label="Samples", show_label=False, columns=3, height="auto", object_fit="contain",
                             visible=False, interactive=False, elem_id="samples")  # fmt: skip
        return cls(job, shown, adapter, timer, panel, plot, samples, cancel, resume, done, try_it, keep, download)

    @property
    def view(self) -> list[Any]:
        return [self.job, self.shown, self.timer, self.panel, self.plot, self.samples, self.cancel, self.resume,
                self.done, self.keep, self.download, self.adapter]  # fmt: skip


_EMPTY = markup.empty(
    "The training shows itself here",
    "Drop pictures, give the adapter a name and a trigger word, and start. Loss and samples appear while it learns.",
)


def _wire_run(form: Form, captions: gr.HTML, start: gr.Button, result: _Result) -> None:
    @polite
    def begin(items: list[Item], *values: Any) -> Any:
        config = config_of(items, values)
        job_id = jobs.submit("train-image", config)
        jobs.ensure_worker()
        return follow(job_id, ())

    @polite
    def look(job_id: str, shown: tuple[Any, ...]) -> Any:
        try:
            return follow(job_id, shown)
        except InputError:  # deleted meanwhile
            off = gr.update(visible=False)
            return ["", (), gr.Timer(active=False), _EMPTY, "", *[off] * 5, gr.skip(), ""]

    @polite
    def stop(job_id: str) -> Any:
        jobs.cancel(job_id)
        return follow(job_id, ())

    @polite
    def go_on(job_id: str) -> Any:
        jobs.resume(job_id)
        jobs.ensure_worker()
        return follow(job_id, ())

    @polite
    def keep(job_id: str) -> Any:
        name = add_to_library(jobs.get(job_id))
        gr.Info(f"It is in the library as '{markup.text(name)}'.", title="Added")
        return name

    private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    start.click(begin, [captions, *(form[name] for name in NAMES)], result.view, **private)
    start.click(None, None, None, js=_TO_RESULT)
    result.timer.tick(look, [result.job, result.shown], result.view, **private)
    result.cancel.click(stop, result.job, result.view, **private)
    result.resume.click(go_on, result.job, result.view, **private)
    result.keep.click(keep, result.job, result.adapter, **private)


_TO_RESULT = """() => { if (window.innerWidth < 760)
  document.getElementById('train-result')?.scrollIntoView({behavior: 'smooth', block: 'start'}); }"""


def config_of(items: Sequence[Item], values: Sequence[Any]) -> TrainImageConfig:
    """The job that a filled form asks for; dropped pictures go before a folder.

    Raises:
        InputError: no pictures, or a value that cannot work.
    """
    config = schema_form.read_all(KNOWN, NAMES, values)
    if not items and not str(config["data"]).strip():
        raise InputError("There are no pictures yet: drop at least one, or name a folder of this computer.")
    parsed = TrainImageConfig.parse({**config, "data": config["data"] or "(dropped pictures)"}, source="the form")
    if items:
        parsed.data = str(pictures.keep(items, parsed.name))
    return parsed


def follow(job_id: str, shown: tuple[Any, ...]) -> Any:
    """What the right side shows of a job; nothing changes while ``shown`` is still true."""
    if not job_id:
        return gr.skip()
    job = jobs.get(job_id)
    drawn = samples(job)
    now = (job.id, job.status, job.progress.step if job.progress else 0, job.progress.stage if job.progress else "",
           len(drawn))  # fmt: skip
    if now == tuple(shown) and job.status != "running":
        return gr.skip()
    new_samples = not shown or (now[0], now[-1]) != (shown[0], shown[-1])
    adapter = made(job)
    return [
        job.id, now, gr.Timer(active=job.active), job_panel.job_panel(job, compose.ahead(job)),
        _kept(job) + _plot(job),
        gr.update(value=drawn, visible=bool(drawn)) if new_samples else gr.skip(),
        gr.update(visible=job.active, value="Stop now" if job.status == "cancelling" else _CANCEL),
        gr.update(visible=job.status in ("cancelled", "interrupted", "failed")),
        gr.update(visible=adapter is not None),
        gr.update(visible=adapter is not None and not in_library(job)),
        gr.update(value=str(adapter)) if adapter and adapter.is_file() else gr.skip(),
        gr.skip() if shown and shown[0] == job.id else "",
    ]  # fmt: skip


_CANCEL = "Cancel and keep what is learnt"


def _plot(job: Job) -> str:
    rows = jobs.history(job.id)
    losses = [(row.step, row.loss) for row in rows if row.loss is not None]
    checks = [(row.step, row.metrics["validation_loss"]) for row in rows if "validation_loss" in row.metrics]
    return loss_plot.loss_plot(losses, checks, total=int(job.config.get("steps") or 0))


def _kept(job: Job) -> str:
    name = in_library(job) if job.status == "done" else ""
    return markup.notice(f"The adapter is in your library as '{name}'.", "info") if name else ""


def samples(job: Job) -> list[tuple[str, str]]:
    """Sample pictures with their step as caption, the latest first."""
    files = sorted(job.folder.rglob("step-*.png"), reverse=True)
    return [(str(file), f"step {step_of(file)}") for file in files if not file.name.startswith(".")]


def step_of(file: Path) -> int:
    """The step in a sample's name (``step-000050-0.png``)."""
    found = re.match(r"step-(\d+)", file.stem)
    return int(found.group(1)) if found else 0


def in_library(job: Job) -> str:
    """Under which name the job itself put its adapter into the library; empty when it did not, or it is gone."""
    name = str((job.result or {}).get("library") or "")
    return name if name and any(record.name == name for record in library.adapters()) else ""


def made(job: Job) -> Path | None:
    """The adapter a finished training made."""
    place = (job.result or {}).get("adapter")
    path = Path(str(place)) if place else None
    return path if path and path.exists() else None


def add_to_library(job: Job) -> str:
    """Put the adapter of a finished training into the library and return its name there; once is enough.

    Raises:
        InputError: there is no adapter yet.
    """
    if name := in_library(job):
        return name
    path = made(job)
    if path is None:
        raise InputError("This training has made no adapter yet.")
    wanted = str(job.config.get("name") or path.stem)
    known = {record.name.lower(): record for record in library.adapters()}
    digest = library.sha256(path)
    same = [record for record in known.values() if record.size == path.stat().st_size and not record.problem]
    for record in same:
        if library.sha256(record.path) == digest:
            return record.name
    name, number = wanted, 2
    while name.lower() in known:
        name, number = f"{wanted}-{number}", number + 1
    return library.import_adapter(path, name).name
