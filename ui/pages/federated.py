"""Federated: one adapter from the data of several clients, simulated here; the same file runs it over a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

import assets
from adapters import catalogue
from adapters.errors import StudioError
from studio import jobs
from studio.federation.history import read_history
from studio.federation.partition_table import parts
from studio.federation.schema import FederateConfig
from ui import markup
from ui.components import federation, job_panel, schema_form
from ui.components.training_run import TO_RESULT
from ui.errors import errors_shown
from ui.events import PRIVATE

KNOWN = schema_form.fields(FederateConfig)
MAIN = ("name", "method", "rounds", "train", "training")
DIVIDED = ("data", "partition", "by", "count", "test_share")
PRIVACY = ("privacy", "target_epsilon", "delta", "clip")
MORE = ("weights", "min_clients", "evaluate_every", "seed", "correction", "strength", "sb_batches", "sb_step",
        "concentration", "test_by", "public_data", "public_calibration")  # fmt: skip
NAMES = (*MAIN, *DIVIDED, *PRIVACY, *MORE)
"""Fields of the form; clients with files of their own and secure aggregation belong to the configuration file."""

SECONDS = 1.0
Form = dict[str, Any]

METHOD_HELP = {rule.name: f"{rule.title}: {rule.summary}" for rule in catalogue.stage("federated")}

EMPTY = markup.empty(
    "Your federation appears here",
    "Each round, clients train on their own rows and send only what was trained. You see who has what, what the shared "
    "adapter has learnt, and how much was sent.",
)

SAMPLE: dict[str, Any] = {
    "train": "classifier", "training": {"base": "emoji-mixer", "rank": 8, "steps": 20, "batch_size": 16},
    "partition": "column", "by": "domain", "test_by": "code", "test_share": 0.3, "name": "three-styles",
}  # fmt: skip
"""What the sample fills in: emoji of three artists, one for each client."""


@dataclass
class Page:
    """What other pages may fill.

    Attributes:
        view: components that :func:`follow` fills.
    """

    form: Form
    view: list[Any]


def build() -> Page:
    """Draw the page inside the current tab."""
    form: Form = {}
    with gr.Row(elem_classes="as-page"):
        with gr.Column(scale=5, min_width=320, elem_classes="as-form"):
            sample, look, file = _settings(form)
            with gr.Row(elem_classes="as-actions"):
                start = gr.Button("Start", variant="primary", elem_id="federated-start", scale=3)
                cancel = gr.Button("Stop", variant="stop", visible=False, elem_id="federated-cancel", scale=1)
                resume = gr.Button("Resume", visible=False, elem_id="federated-resume", scale=1)
        with gr.Column(scale=7, min_width=320, elem_classes="as-training-result"):
            job, shown, timer = gr.State(""), gr.State(()), gr.Timer(SECONDS, active=False)
            panel = gr.HTML(EMPTY, elem_id="federated-panel", apply_default_css=False)
            divided = gr.HTML("", elem_id="federated-parts", apply_default_css=False)
            plots = gr.HTML("", elem_id="federated-curves", apply_default_css=False)
    view = [job, shown, timer, panel, divided, plots, cancel, resume]
    inputs = [form[name] for name in NAMES]

    @errors_shown
    def begin(*values: Any) -> Any:
        job_id = jobs.submit("federate", config_of(values))
        jobs.ensure_worker()
        return follow(job_id, ())

    def gone() -> list[Any]:
        return ["", (), gr.Timer(active=False), EMPTY, "", "", *[gr.update(visible=False)] * 2]

    start.click(begin, inputs, view, **PRIVATE)
    start.click(None, None, None, js=TO_RESULT)
    job_panel.steer(job_panel.Area(job, timer, cancel, view, resume, shown), follow, gone)
    look.click(errors_shown(look_at), inputs, [divided, file], **PRIVATE)
    sample.click(lambda: fill(sample_config()), None, inputs, **PRIVATE).then(
        errors_shown(look_at), inputs, [divided, file], **PRIVATE
    )
    return Page(form, view)


def _settings(form: Form) -> tuple[gr.Button, gr.Button, gr.Code]:
    with gr.Group(elem_classes="as-card"):
        form["method"] = schema_form.widget(KNOWN["method"], elem_id="federated-method", info=None)
        said = gr.HTML(_help(KNOWN["method"].default), elem_classes="as-help", apply_default_css=False)
        for pair in (("rounds", "name"), ("train",)):
            with gr.Row():
                for name in pair:
                    form[name] = schema_form.widget(KNOWN[name], elem_id=f"federated-{name}", min_width=150)
        form["training"] = schema_form.widget(KNOWN["training"], elem_id="federated-training")
    form["method"].change(_help, form["method"], said, **PRIVATE)
    with gr.Group(elem_classes="as-card"):
        form["data"] = schema_form.widget(KNOWN["data"], elem_id="federated-data")
        for pair in (("partition", "by"), ("count", "test_share")):
            with gr.Row():
                for name in pair:
                    form[name] = schema_form.widget(KNOWN[name], elem_id=f"federated-{name}", min_width=150)
        with gr.Row():
            look = gr.Button("Show who has what", size="md", elem_id="federated-look")
            sample = gr.Button("Use the sample", size="md", elem_id="federated-sample")
    with gr.Accordion("Privacy", open=False, elem_classes="as-more"):
        for name in PRIVACY:
            form[name] = schema_form.widget(KNOWN[name], elem_id=f"federated-{name}")
    with gr.Accordion("More", open=False, elem_classes="as-more"):
        for name in MORE:
            form[name] = schema_form.widget(KNOWN[name], elem_id=f"federated-{name}")
    with gr.Accordion("As a file, for the command and a network", open=False, elem_classes="as-more"):
        file = gr.Code("", language="yaml", label="federation.yaml", interactive=False, elem_id="federated-file")
    return sample, look, file


def _help(method: Any) -> str:
    return f"<p>{markup.text(METHOD_HELP.get(str(method), ''))}</p>"


def sample_config() -> dict[str, Any]:
    """The values of the sample."""
    return {**SAMPLE, "data": str(assets.path("federated/rows.jsonl"))}


def fill(config: dict[str, Any]) -> list[Any]:
    """Values of the form's widgets; what ``config`` leaves out stays."""
    return [schema_form.show(KNOWN[name], config[name]) if name in config else gr.skip() for name in NAMES]


def config_of(values: tuple[Any, ...]) -> FederateConfig:
    """The job of a filled form; raises :class:`InputError`."""
    return FederateConfig.parse(schema_form.read_all(KNOWN, NAMES, values), source="the form")


def look_at(*values: Any) -> Any:
    """The picture of the partition, and the configuration as a file."""
    config = config_of(values)
    return federation.who_has_what(parts(config)), config.to_yaml()


def follow(job_id: str, shown: tuple[Any, ...]) -> Any:
    """The right side for a job; nothing changes while ``shown`` is up to date."""
    if not job_id:
        return gr.skip()
    job = jobs.get(job_id)
    step = (job.progress.stage, job.progress.step) if job.progress else ()
    now = (job.id, job.status, *step)
    if now == tuple(shown) and job.status != "running":
        return gr.skip()
    rounds = read_history(Path(job.folder))
    plots = federation.curves(rounds, int(job.config.get("rounds") or 0)) + federation.table(rounds)
    return [
        job.id, now, gr.Timer(active=job.active), job_panel.job_panel(job, job_panel.ahead(job)) + _done(job),
        gr.skip() if shown and shown[0] == job.id else _parts(job), plots,
        gr.update(visible=job.active, value="Stop now" if job.status == "cancelling" else "Stop"),
        gr.update(visible=job.status in ("cancelled", "interrupted", "failed")),
    ]  # fmt: skip


def _parts(job: jobs.Job) -> str:
    try:
        return federation.who_has_what(parts(FederateConfig.parse(job.config)))
    except StudioError:  # the data are gone
        return ""


def _done(job: jobs.Job) -> str:
    result = job.result or {}
    if job.status != "done":
        return ""
    told = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in result.get("measures", {}).items())
    epsilon = f"; epsilon {result['epsilon']:.3g}" if "epsilon" in result else ""
    kept = f" It is in your library as '{result['library']}'." if result.get("library") else ""
    return markup.notice(f"{result['rounds']} rounds with {result['clients']} clients: {told}{epsilon}.{kept}", "info")
