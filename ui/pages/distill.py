"""Distil, a way to train: build guidance, or sampling in few steps, into an adapter. No pictures are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio import jobs
from studio.datasets.prompts import keep_prompts
from studio.training import presets, ready
from studio.training.schemas.distill import DistillConfig
from ui import markup
from ui.components import faces, schema_form, training_run
from ui.components import presets as preset_fields
from ui.errors import errors_shown
from ui.events import PRIVATE
from ui.pages import compose

KNOWN = schema_form.fields(DistillConfig)
NAMES = tuple(KNOWN)

MAIN = ("preset", "objective", "name", "guidance", "guidance_mode", "prompts", "base", "styles", "steps", "rank",
        "learning_rate", "batch_size", "trajectory_count", "inference_steps", "sample_prompts",
        "sample_every")  # fmt: skip
"""Fields shown at once; the rest are in groups below."""

OBJECTIVES = [("Twice as fast", "guidance"), ("A few steps", "consistency")]
MODES = [("Fixed", "fixed"), ("By weight", "strength"), ("As a setting", "embedding")]

PRESETS = {"guidance": "guidance", "consistency": "few-steps"}
"""The preset of an objective."""

FIRST = str(KNOWN["objective"].default)
JOB = DistillConfig.kind

OBJECTIVE_HELP = {
    "guidance": "Guidance becomes part of the adapter: one pass per step instead of two, the same number of steps.",
    "consistency": "Pictures in two to eight steps with the LCM sampler, guidance built in. Takes longer to learn.",
}
MODE_HELP = {
    "fixed": "One guidance is built in. Any program that loads a LoRA can use it, with guidance set to 1.",
    "strength": "The adapter's weight chooses the guidance: weight 1 is the value above, weight 0 none.",
    "embedding": "Guidance stays a setting from 1 on. Needs a second file beside the LoRA; SD 1.5/2 and SDXL only.",
}

Form = dict[str, Any]


@dataclass
class Page:
    """What other pages may fill."""

    form: Form
    job: gr.State
    try_it: gr.Button
    step: gr.Dropdown
    view: list[Any]
    """Components that :func:`ui.components.training_run.follow` fills."""


def build() -> Page:
    """Draw the form and the result inside the current row."""
    with gr.Column(scale=6, min_width=320, elem_classes="as-form"):
        form = _settings()
        with gr.Row(elem_classes="as-actions"):
            start = gr.Button("Start distilling", variant="primary", elem_id="distill-start", scale=3)
            ask = gr.Button("Memory and time", elem_id="distill-estimate", scale=1, min_width=120)
        needs = gr.HTML("", elem_id="distill-needs", elem_classes="as-help", apply_default_css=False)
    with gr.Column(scale=6, min_width=320, elem_classes="as-training-result"):
        result = training_run.Run.draw("distill", _EMPTY)
    inputs = [form[name] for name in NAMES]
    ask.click(errors_shown(needed), inputs, needs, api_visibility="private")
    result.follow_job(start, _begin, inputs)
    return Page(form, result.job, result.try_it, result.step, result.view)


_EMPTY = markup.empty(
    "Your distillation appears here",
    "The base model teaches an adapter. Loss, samples and the guided base's pictures appear while it learns.",
)


def _settings() -> Form:
    form: Form = {"preset": schema_form.widget(KNOWN["preset"], value=PRESETS[FIRST], visible=False)}
    with gr.Group(elem_classes="as-card"):
        form["objective"] = _choice("objective", OBJECTIVES, OBJECTIVE_HELP, "What to save")
        form["name"] = schema_form.widget(KNOWN["name"], elem_id="distill-name")
        form["prompts"] = gr.Textbox(
            label="Prompts", lines=4, max_lines=10, value="", elem_id="distill-prompts",
            info="One per line, of the kind you will draw; twenty to two hundred work well.",
            placeholder="a flat icon of a red apple\na bold icon of a dog",
        )  # fmt: skip
    with gr.Group(elem_classes="as-card"):
        form["guidance"] = _widget("guidance")
        form["guidance_mode"] = _choice("guidance_mode", MODES, MODE_HELP, "How guidance is chosen later")
    with gr.Group(elem_classes="as-card"):
        form["base"] = gr.Dropdown(
            compose.base_choices(), value=KNOWN["base"].default, label="Base model", info=KNOWN["base"].help,
            allow_custom_value=True, interactive=True, elem_id="distill-base",
        )  # fmt: skip
        form["styles"] = gr.Dropdown(
            compose.adapter_choices(), value=[], multiselect=True, label="On top of", info=KNOWN["styles"].help,
            allow_custom_value=True, interactive=True, elem_id="distill-styles",
            elem_classes=faces.MENU,
        )  # fmt: skip
        for pair in (("steps", "rank"), ("learning_rate", "batch_size"), ("trajectory_count", "inference_steps")):
            with gr.Row():
                for name in pair:
                    form[name] = _widget(name, min_width=150, visible=name != "inference_steps")
        form["sample_prompts"] = schema_form.widget(KNOWN["sample_prompts"], elem_id="distill-samples")
        form["sample_every"] = schema_form.widget(KNOWN["sample_every"])
    for group, names in schema_form.groups(KNOWN, MAIN).items():
        with gr.Accordion(group, open=False, elem_classes="as-more"):
            for name in names:
                form[name] = _widget(name)
    form["objective"].change(
        lambda objective: gr.update(visible=objective == "consistency"),
        form["objective"], form["inference_steps"], **PRIVATE,
    )  # fmt: skip
    form["objective"].input(preset_values, [form["objective"], form["base"]], [form[name] for name in PRESET_FIELDS],
                            **PRIVATE)  # fmt: skip
    preset_fields.follow_base(JOB, KNOWN, form, form["base"])
    return form


PRESET_FIELDS = tuple(sorted({"preset", *presets.fields(JOB)} - {"objective"}))


def preset_values(objective: str, base: str) -> list[Any]:
    """Widget values of :data:`PRESET_FIELDS` for an objective on a base."""
    return preset_fields.values(JOB, KNOWN, PRESET_FIELDS, PRESETS[objective], base)


def _widget(name: str, **options: Any) -> gr.components.Component:
    """The widget of a field, at the value of the preset that is chosen first."""
    value = preset_fields.values(JOB, KNOWN, [name], PRESETS[FIRST], str(KNOWN["base"].default))[0]
    return schema_form.widget(KNOWN[name], value=value, elem_id=f"distill-{name}", **options)


def _choice(name: str, choices: list[tuple[str, str]], words: dict[str, str], label: str) -> gr.Radio:
    """Cards to choose from, with a sentence about the chosen one."""
    first = KNOWN[name].default
    radio = gr.Radio(choices, value=first, label=label, elem_classes="as-choices", elem_id=f"distill-{name}")
    shown = gr.HTML(_sentence(words[first]), elem_classes="as-help", apply_default_css=False)
    radio.change(
        lambda value: _sentence(words.get(value, "")), radio, shown, **PRIVATE
    )
    return radio


def _sentence(text: str) -> str:
    return f"<p>{markup.text(text)}</p>"


def config_of(values: Sequence[Any]) -> DistillConfig:
    """The job of a filled form; prompts are written to a file.

    Raises:
        InputError: no prompts and no pictures, or a value that cannot work.
    """
    by_name = dict(zip(NAMES, values, strict=True))
    written, styles = str(by_name.pop("prompts") or ""), list(by_name.pop("styles") or [])
    config = schema_form.read_all(KNOWN, list(by_name), by_name.values()) | {"styles": styles}
    if written.strip() or not str(config["data"]).strip():
        config["prompts"] = str(keep_prompts(written, str(config["name"])))
    return DistillConfig.parse(config, source="the form")


def needed(*values: Any) -> str:
    """Memory and time of the form's distillation, as a line of HTML."""
    from studio.processes import apart
    from studio.training import estimate

    config = config_of(values)
    ready.distill(config)
    return markup.text(estimate.sentence(apart(estimate.estimated, config)))


def _begin(*values: Any) -> str:
    return jobs.submit("distill", config_of(values))
