"""Ask about pictures: a picture, a question, and the answers of a vision-language model with and without adapters; and
train an adapter from pictures with questions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from adapters.errors import InputError, StudioError
from studio import jobs, library
from studio.conversation import Question, Variant, variants_of
from studio.conversation.client import Client
from studio.training import presets
from studio.training.schemas.vision_language import TrainVisionLanguageConfig
from ui import markup, pictures
from ui.components import library_choices, method_help, rows_file, schema_form, training_run
from ui.components import presets as preset_fields
from ui.components.answers_run import Run, follow
from ui.errors import errors_shown, say
from ui.events import PRIVATE

EMBEDDED = "tinysight"
FAMILY = "vision-language"
MOST = 4
"""Answers that fit side by side: the base and three adapters."""

KNOWN = schema_form.fields(TrainVisionLanguageConfig)
NAMES = tuple(name for name in KNOWN if name not in ("data", "base"))
LENGTHS = [("Quick try", "quick"), ("Normal", "normal")]
PRESET_FIELDS = tuple(sorted(presets.fields(TrainVisionLanguageConfig.kind)))


CLIENT = Client()
"""The process that holds the model; the app itself never loads one."""

_EMPTY = markup.empty("Answers appear here", "Choose an example, or drop a picture and ask something about it.")


@dataclass
class Page:
    """What other pages may fill."""

    base: gr.Dropdown
    adapters: gr.Dropdown
    mode: gr.Radio
    view: list[Any]
    """Components that :func:`~ui.components.answers_run.follow` fills."""

    @property
    def jobs_view(self) -> list[Any]:
        """Components that :func:`open_job` fills."""
        return [self.mode, *self.view]


@dataclass(frozen=True)
class Example:
    """A picture that comes with the embedded model, and a question it can answer."""

    picture: Path
    question: str


def examples() -> list[Example]:
    """The examples of the embedded model; none when it is missing."""
    place = next((record.path for record in library.bases() if record.name == EMBEDDED), None)
    file = place / "examples" / "examples.json" if place else None
    if file is None or not file.is_file():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    return [Example(file.parent / one["picture"], one["question"]) for one in found]


def base_choices() -> list[tuple[str, str]]:
    """Usable vision-language models."""
    return library_choices.bases(FAMILY)


def adapter_choices() -> list[tuple[str, str]]:
    """Usable adapters of vision-language models."""
    return library_choices.adapters(FAMILY)


def build() -> Page:
    """Draw the page inside the current tab."""
    shown = examples()
    with gr.Row(elem_classes="as-page"):
        with gr.Column(scale=4, min_width=320, elem_classes="as-form"):
            mode = gr.Radio([("Ask", "ask"), ("Train from a file", "train")], value="ask", show_label=False,
                            container=False, elem_classes="as-choices", elem_id="ask-mode",
                            label="What to do")  # fmt: skip
            base = _base_card()
            with gr.Column(elem_classes="as-form") as asking:
                fields, begun = _asking(shown)
            with gr.Column(elem_classes="as-form", visible=False) as training:
                form, rows, start = _training(base)
        with gr.Column(scale=8, min_width=320, elem_id="ask-result", elem_classes="as-training-result") as answered:
            status = gr.HTML("", elem_id="ask-status", apply_default_css=False)
            said = gr.HTML(_EMPTY, elem_id="ask-answers", apply_default_css=False)
        with gr.Column(scale=8, min_width=320, visible=False, elem_id="ask-training",
                       elem_classes="as-training-result") as learnt:  # fmt: skip
            result = Run.draw("sight", _NO_TRAINING, "Ask with it")
    mode.change(
        lambda chosen: [gr.update(visible=chosen == way) for way in ("ask", "train") for _ in range(2)],
        mode, [asking, answered, training, learnt], **PRIVATE,
    )  # fmt: skip
    _wire_asking(fields, base, begun, shown, status, said)
    result.follow_job(start, config_of, [rows, base, *(form[name] for name in NAMES)])
    result.talk.click(errors_shown(_use_trained), result.job, [mode, base, fields.adapters], **PRIVATE)
    return Page(base, fields.adapters, mode, result.view)


def _base_card() -> gr.Dropdown:
    with gr.Group(elem_classes="as-card"):
        return gr.Dropdown(
            base_choices(), value=EMBEDDED, label="Vision-language model", allow_custom_value=True,
            interactive=True, info=f"From your library, or a hub id. {EMBEDDED} comes with the studio.",
            elem_id="ask-base",
        )  # fmt: skip


@dataclass
class _Asking:
    """The fields of a question."""

    drop: gr.File
    preview: gr.HTML
    picture: gr.State
    question: gr.Textbox
    adapters: gr.Dropdown
    settings: list[Any]
    send: gr.Button
    stop: gr.Button


def _asking(shown: Sequence[Example]) -> tuple[_Asking, list[gr.Button]]:
    with gr.Group(elem_classes="as-card"):
        drop = gr.File(label="Drop a picture here", show_label=False, height=120, elem_id="ask-drop",
                       file_types=["image", *sorted(pictures.SUFFIXES)])  # fmt: skip
        preview = gr.HTML("", elem_id="ask-picture", apply_default_css=False)
        picture = gr.State(None)
        question = gr.Textbox(label="Your question", lines=2, max_lines=6, value="",
                              placeholder="What is on the left?", elem_id="ask-question",
                              info="Shift + Enter asks.")  # fmt: skip
    begun: list[gr.Button] = []
    if shown:
        gr.HTML(markup.heading("Examples", "A click asks at once."), apply_default_css=False)
        with gr.Row(elem_classes="as-actions-row", elem_id="ask-examples"):
            begun = [gr.Button(one.question, icon=str(one.picture), size="md") for one in shown]
    with gr.Group(elem_classes="as-card"):
        adapters = gr.Dropdown(
            adapter_choices(), value=[], multiselect=True, label="Adapters", interactive=True,
            info="Choose from your library; none = the base alone.", elem_id="ask-adapters",
        )  # fmt: skip
        how = gr.Radio(
            [("Side by side with the base", "compare"), ("All at once", "together")], value="compare",
            label="With adapters", elem_classes="as-choices", elem_id="ask-compare",
        )  # fmt: skip
    with gr.Group(elem_classes="as-card"), gr.Row():
        temperature = gr.Number(0.0, label="Temperature", minimum=0, maximum=5, step=0.1, min_width=100,
                                info="0 = likeliest words")  # fmt: skip
        tokens = gr.Number(64, label="Longest answer", minimum=1, precision=0, min_width=100, info="tokens",
                           elem_id="ask-tokens")  # fmt: skip
        seed = gr.Number(0, label="Seed", minimum=0, precision=0, min_width=100,
                         info="same seed, same answer")  # fmt: skip
    with gr.Row(elem_classes="as-actions"):
        send = gr.Button("Ask", variant="primary", elem_id="ask-send", scale=3)
        stop = gr.Button("Stop", variant="stop", elem_id="ask-stop", scale=1, min_width=80)
    settings = [adapters, how, temperature, tokens, seed]
    return _Asking(drop, preview, picture, question, adapters, settings, send, stop), begun


def _wire_asking(
    fields: _Asking,
    base: gr.Dropdown,
    begun: Sequence[gr.Button],
    shown: Sequence[Example],
    status: gr.HTML,
    said: gr.HTML,
) -> None:
    @errors_shown
    def dropped(file: str | None) -> Any:
        if not file:
            return gr.skip()
        item, remarks = pictures.started(Path(file))
        for remark in remarks:
            say(f"{item['name']}: {remark}.", title="Picture read")
        return None, item, _preview(item)

    f = fields
    f.drop.upload(dropped, f.drop, [f.drop, f.picture, f.preview], **PRIVATE)
    asked = [f.picture, f.question, base, *f.settings]
    for button in (f.send, *begun):
        button.click(None, None, None, js=training_run.TO_RESULT)
    for event in (f.send.click, f.question.submit):
        event(answer, asked, [status, said], **PRIVATE)
    for button, one in zip(begun, shown, strict=True):
        filled = button.click(errors_shown(_filling(one)), None, [f.picture, f.preview, f.question], **PRIVATE)
        filled.then(answer, asked, [status, said], **PRIVATE)
    f.stop.click(errors_shown(lambda: CLIENT.stop()), None, None, queue=False, **PRIVATE)


def _filling(example: Example) -> Any:
    """A handler that puts an example into the form."""

    def fill() -> Any:
        item, _ = pictures.started(pictures.taken(example.picture.name, example.picture))
        return item, _preview(item), example.question

    return fill


def _preview(item: Mapping[str, Any]) -> str:
    words = f"The picture {item['name']}"
    return (
        f'<figure class="as-asked"><img alt="{markup.text(words)}" src="{markup.text(item["url"])}">'
        f"<figcaption>{markup.text(item['name'])} · {markup.text(item['size'])}</figcaption></figure>"
    )


def answer(
    item: Mapping[str, Any] | None, text: str, base: str, adapters: Sequence[str] | None, how: str,
    temperature: float, tokens: float, seed: float,
) -> Iterator[Any]:  # fmt: skip
    """The status and the answers as they come in."""
    try:
        if not item:
            raise InputError("There is no picture yet: drop one, or choose an example.")
        if not (text or "").strip():
            raise InputError("Write a question first.")
        present = variants(adapters, how)
        sampling = {"temperature": float(temperature or 0), "max_tokens": int(tokens or 64), "seed": int(seed or 0)}
        place = str(pictures.uploaded(str(item.get("id", ""))))
        talk = ({"role": "user", "content": text.strip()},)
        question = Question(
            str(base or EMBEDDED), present, (talk,) * len(present), sampling=sampling, picture=place
        )  # fmt: skip
        yield from _answers(question, item)
    except StudioError as error:
        say(str(error))
        yield [markup.notice(str(error)), gr.skip()]


def variants(adapters: Sequence[str] | None, how: str) -> tuple[Variant, ...]:
    """Who answers; raises :class:`InputError` when they do not fit side by side."""
    found = variants_of([(name, 1.0) for name in adapters or ()], how == "compare")
    if len(found) > MOST:
        raise InputError(f"Side by side there is room for {MOST - 1} adapters: remove some.")
    return found


def _answers(question: Question, item: Mapping[str, Any]) -> Iterator[Any]:
    texts: list[str | None] = [None] * len(question.variants)
    asked = question.conversations[0][-1]["content"]
    remarks = ""

    def shown(status: str) -> list[str]:
        return [remarks + status, _cards(item, asked, question.variants, texts)]

    yield shown(_status(f"asking {question.base} ..."))
    with closing(CLIENT.ask(question)) as events:
        for event in events:
            if event["event"] == "begin":
                texts[event["variant"]] = ""
            elif event["event"] == "piece":
                texts[event["variant"]] = f"{texts[event['variant']]}{event['text']}"
            elif event["event"] == "remark":
                remarks += markup.notice(event["text"], "info")
            yield shown(_status(event["text"] if event["event"] == "loading" else "answering ..."))
    yield shown("")


def _cards(
    item: Mapping[str, Any], asked: str, present: Sequence[Variant], texts: Sequence[str | None]
) -> str:  # fmt: skip
    """The picture, the question and one card per answer."""
    cards = "".join(
        f"<article><h4>{markup.text(variant.name)}</h4><p>{markup.text((text or '').lstrip()) or '…'}</p></article>"
        for variant, text in zip(present, texts, strict=True)
    )
    return (
        f'<section class="as-said" aria-live="polite"><img alt="{markup.text(item["name"])}" '
        f'src="{markup.text(item["url"])}"><div><h3>{markup.text(asked)}</h3>'
        f'<div class="as-said-cards">{cards}</div></div></section>'
    )


def _status(text: str) -> str:
    return f'<p class="as-help" role="status">{markup.text(text)}</p>'


def use(record: library.Record) -> list[Any]:
    """Values of mode, base and adapters that put a library item to use."""
    if record.kind == "base":
        return ["ask", record.name, gr.skip()]
    return ["ask", gr.skip(), gr.update(choices=adapter_choices(), value=[record.name])]


# ------------------------------------------------------------------------------------------------ training

_NO_TRAINING = markup.empty(
    "Your training appears here",
    "Drop a file of questions with their pictures, give the adapter a name, and start. Loss, measures and answers "
    "appear while it learns.",
)


def _training(base: gr.Dropdown) -> tuple[dict[str, Any], gr.State, gr.Button]:
    """The form; returns its widgets, the file of rows and the button that starts."""
    form: dict[str, Any] = {}
    with gr.Group(elem_classes="as-card"):
        words = "A file with the columns image, question and answer, and the pictures it names, all at once."
        gr.HTML(markup.heading("Questions and pictures", words), apply_default_css=False)
        drop = gr.File(
            label="Drop the file and its pictures here", show_label=False, file_count="multiple", height=110,
            file_types=[*rows_file.TYPES, "image", *sorted(pictures.SUFFIXES)], elem_id="sight-drop",
        )  # fmt: skip
        place = gr.Textbox(label="Or a file on this computer", placeholder="/path/to/questions.jsonl", max_lines=1,
                           elem_id="sight-place", info="Its pictures stay where they are.")  # fmt: skip
        rows = gr.State("")
        preview = gr.HTML("", elem_id="sight-preview", apply_default_css=False)
    with gr.Group(elem_classes="as-card"):
        form["preset"] = gr.Radio(LENGTHS, value="normal", label="How long", elem_classes="as-choices",
                                  elem_id="sight-preset")  # fmt: skip
        for pair in (("name", "validation_split"), ("steps", "rank"), ("learning_rate", "batch_size")):
            with gr.Row():
                for name in pair:
                    begin = {"value": "my-sight"} if name == "name" else {}
                    form[name] = schema_form.widget(KNOWN[name], elem_id=f"sight-{name}", min_width=140, **begin)
    for group, names in schema_form.groups(KNOWN, [*form, "base", "data"]).items():
        with gr.Accordion(group, open=False, elem_classes="as-more"):
            method = group == "Method"
            for name in names:
                form[name] = method_help.widget(KNOWN[name], "sight") if method else schema_form.widget(KNOWN[name])
            if method:
                method_help.watch(form, KNOWN, "sight")
    form["preset"].input(preset_values, form["preset"], [form[name] for name in PRESET_FIELDS], **PRIVATE)
    with gr.Row(elem_classes="as-actions"):
        start = gr.Button("Start training", variant="primary", elem_id="sight-start")
    drop.change(errors_shown(_dropped), drop, [rows, preview], **PRIVATE)
    place.submit(errors_shown(_named), place, [rows, preview], **PRIVATE)
    place.blur(errors_shown(_named), place, [rows, preview], **PRIVATE)
    return form, rows, start


def preset_values(preset: str) -> list[Any]:
    """Widget values of :data:`PRESET_FIELDS` for a preset."""
    return preset_fields.values(TrainVisionLanguageConfig.kind, KNOWN, PRESET_FIELDS, preset, EMBEDDED)


def _dropped(files: Sequence[str] | None) -> Any:
    if not files:
        return "", ""
    return _seen(rows_file.keep_with_pictures(files))


def _named(place: str | None) -> Any:
    if not (place or "").strip():
        return gr.skip(), gr.skip()
    return _seen(Path(str(place).strip()).expanduser())


def _seen(file: Path) -> Any:
    try:
        return str(file), rows_file.describe_pictured(file)
    except StudioError as error:
        return str(file), markup.notice(str(error))


def config_of(data: str, base: str, *values: Any) -> TrainVisionLanguageConfig:
    """The job of a filled form; raises :class:`InputError` for what cannot work."""
    if not data:
        raise InputError("There are no rows yet: drop a file with its pictures first.")
    config = schema_form.read_all(KNOWN, NAMES, values)
    return TrainVisionLanguageConfig.parse({**config, "base": base or EMBEDDED, "data": data}, source="the form")


def _use_trained(job_id: str) -> list[Any]:
    job = jobs.get(job_id)
    name = training_run.add_to_library(job)
    return ["ask", job.config.get("base") or EMBEDDED, gr.update(choices=adapter_choices(), value=[name])]


def open_job(job_id: str, shown: tuple[Any, ...]) -> list[Any]:
    """Values of :attr:`Page.jobs_view`."""
    return ["train", *follow(job_id, shown)]
