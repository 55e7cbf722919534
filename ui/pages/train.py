"""Train: drop pictures, say what they show, get an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio import jobs
from studio.training import presets, ready
from studio.training.schemas.image import TrainImageConfig
from ui import markup, pictures
from ui.components import caption_tools, method_help, remembered, schema_form, training_run
from ui.components import presets as preset_fields
from ui.components.training_run import add_to_library, follow, samples
from ui.errors import errors_shown, say
from ui.events import PRIVATE
from ui.pages import compose, distill
from ui.pictures import Item
from ui.theme import script

KNOWN = schema_form.fields(TrainImageConfig)
NAMES = tuple(KNOWN)

MAIN = ("name", "trigger", "instance_prompt", "base", "steps", "rank", "learning_rate", "batch_size", "resolution",
        "sample_prompts", "sample_every")  # fmt: skip
"""Fields shown at once; ``mode`` and ``data`` are the cards on top, the rest are in groups below."""

METHOD = "Method"
"""The schema's group for how an adapter starts and learns."""

KINDS = [("A concept", "concept"), ("A style", "style"), ("A captioned set", "captioned")]
LENGTHS = [("Quick try", "quick"), ("Normal", "normal")]
FIRST_PRESET = "concept-normal"
JOB = TrainImageConfig.kind

WAYS = [("Learn pictures", "pictures"), ("Distil the model", "distill")]
"""Purposes of a training; each has its own form."""

Form = dict[str, Any]


@dataclass
class Page:
    """What other pages may fill."""

    form: Form
    captions: gr.HTML
    job: gr.State
    try_it: gr.Button
    step: gr.Dropdown
    view: list[Any]
    """Components that :func:`follow` fills."""
    way: gr.Radio
    learning: gr.Row
    distilling: gr.Row
    distill: distill.Page

    @property
    def kept(self) -> list[Any]:
        """What survives a reload, see :func:`restore`."""
        return [self.captions, *(self.form[name] for name in NAMES)]

    @property
    def switch(self) -> list[Any]:
        """Components that :func:`show_way` fills."""
        return [self.way, self.learning, self.distilling]


def build() -> Page:
    """Draw the page inside the current tab."""
    way = gr.Radio(WAYS, value="pictures", label="What for", elem_classes="as-choices as-way", elem_id="train-way")
    with gr.Row(elem_classes="as-page") as learning:
        with gr.Column(scale=6, min_width=320, elem_classes="as-form"):
            drop, captions = _picture_card()
            form = _settings()
            with gr.Row(elem_classes="as-actions"):
                start = gr.Button("Start training", variant="primary", elem_id="train-start", scale=3)
                ask = gr.Button("Memory and time", elem_id="train-estimate", scale=1, min_width=120)
            needs = gr.HTML("", elem_id="train-needs", elem_classes="as-help", apply_default_css=False)
        with gr.Column(scale=6, min_width=320, elem_id="train-result", elem_classes="as-training-result"):
            result = training_run.Run.draw("train", _EMPTY)
    with gr.Row(elem_classes="as-page", visible=False) as distilling:
        distill_page = distill.build()
    run = (result.job, result.try_it, result.step, result.view)
    page = Page(form, captions, *run, way, learning, distilling, distill_page)
    way.input(show_way, way, page.switch, **PRIVATE)
    _wire_pictures(drop, captions)
    ask.click(errors_shown(needed), [captions, *(form[name] for name in NAMES)], needs, api_visibility="private")
    result.follow_job(start, _begin, [captions, *(form[name] for name in NAMES)])
    return page


def restore(kept: Any) -> Any:
    """The pictures and the form kept by the browser; pictures that no longer exist are left out."""
    values = remembered.values(kept, 1 + len(NAMES))
    return [pictures.still_here(values[0]), *values[1:]] if values else gr.skip()


def show_way(way: str) -> list[Any]:
    """Show the form of a way to train, and hide the others."""
    return [way, gr.update(visible=way == "pictures"), gr.update(visible=way == "distill")]


# ------------------------------------------------------------------------------------------------ the form


def _picture_card() -> tuple[gr.File, gr.HTML]:
    with gr.Group(elem_classes="as-card"):
        hint = "Five to twenty work well. You can drop captions too, as .txt or .caption files."
        gr.HTML(markup.heading("Pictures", hint), apply_default_css=False)
        drop = gr.File(
            label="Drop pictures here", file_count="multiple", height=120,
            file_types=["image", *sorted(pictures.SUFFIXES), *pictures.CAPTIONS], elem_id="train-drop",
            show_label=False,
        )  # fmt: skip
        captions = gr.HTML(
            [], html_template='<ul class="as-captions" aria-label="Training pictures" hidden></ul>',
            js_on_load=script("captions"), apply_default_css=False, elem_id="captions",
        )  # fmt: skip
        caption_tools.draw(captions)
    return drop, captions


def _settings() -> Form:
    form: Form = {"preset": schema_form.widget(KNOWN["preset"], value=FIRST_PRESET, visible=False)}
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
    with gr.Accordion(METHOD, open=False, elem_classes="as-more", elem_id="train-method"):
        place = gr.Column()
        for name in schema_form.groups(KNOWN, form)[METHOD]:
            form[name] = _widget(name)
    for group, names in schema_form.groups(KNOWN, form).items():
        with gr.Accordion(group, open=False, elem_classes="as-more"):
            for name in names:
                form[name] = _widget(name)
    with place:
        method_help.watch(form, KNOWN, "train")
    for chooser in (form["mode"], length):
        chooser.input(preset_values, [form["mode"], length, form["base"]], [form[name] for name in PRESET_FIELDS],
                      **PRIVATE)  # fmt: skip
    preset_fields.follow_base(JOB, KNOWN, form, form["base"])
    form["preset"].change(lambda name: name.rpartition("-")[2], form["preset"], length,  # a form that came back
                          **PRIVATE)  # fmt: skip
    return form


def _widget(name: str, **options: Any) -> gr.components.Component:
    """The widget of a field, with the value of the initial preset."""
    options["value"] = preset_fields.values(JOB, KNOWN, [name], FIRST_PRESET, str(KNOWN["base"].default))[0]
    if KNOWN[name].group == METHOD:
        return method_help.widget(KNOWN[name], "train", **options)
    return schema_form.widget(KNOWN[name], **options)


PRESET_FIELDS = tuple(sorted({"preset", *presets.fields(JOB)} - {"mode"}))


def preset_values(mode: str, length: str, base: str) -> list[Any]:
    """Widget values of :data:`PRESET_FIELDS` for a kind and length of training on a base."""
    return preset_fields.values(JOB, KNOWN, PRESET_FIELDS, f"{mode}-{length}", base)


# ------------------------------------------------------------------------------------------------ pictures


def _wire_pictures(drop: gr.File, captions: gr.HTML) -> None:
    @errors_shown
    def dropped(files: list[str] | None, present: list[Item]) -> Any:
        items, problems = pictures.receive(files or (), present)
        if problems:
            say(" ".join(problems), title="About these files")
        return None, items

    drop.upload(dropped, [drop, captions], [drop, captions], **PRIVATE)


# ------------------------------------------------------------------------------------------------ the run


_EMPTY = markup.empty(
    "Your training appears here",
    "Drop pictures, give the adapter a name and a trigger word, and start. Loss and samples appear while it learns.",
)


def _begin(items: list[Item], *values: Any) -> str:
    config = config_of(items, values)
    try:
        return jobs.submit("train-image", config)
    except InputError:
        if items:
            pictures.forget(Path(config.data))
        raise


def needed(items: Sequence[Item], *values: Any) -> str:
    """Memory and time of the form's training, as a line of HTML."""
    from studio.processes import apart
    from studio.training import estimate

    config = schema_form.read_all(KNOWN, NAMES, values)
    parsed = TrainImageConfig.parse({**config, "data": config["data"] or "(dropped pictures)"}, source="the form")
    if config["data"] and not items:
        ready.image(parsed)
    elif parsed.epochs:
        parsed = parsed.model_copy(update={"steps": estimate.steps(parsed, len(items)), "epochs": None})
    return markup.text(estimate.sentence(apart(estimate.estimated, parsed)))


def config_of(items: Sequence[Item], values: Sequence[Any]) -> TrainImageConfig:
    """The job of a filled form; dropped pictures take precedence over a folder.

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


__all__ = ["Page", "add_to_library", "build", "config_of", "follow", "samples", "show_way"]
