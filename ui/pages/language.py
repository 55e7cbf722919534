"""Language: talk to a model with adapters, compare adapters side by side, train one from a file of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from adapters.errors import InputError, StudioError
from studio import jobs, library
from studio.conversation import Message, Question, Variant, variants_of
from studio.conversation.client import Client
from studio.training import presets, ready
from studio.training.schemas.language import TrainLanguageConfig
from ui import markup
from ui.components import compressing, library_choices, method_help, rows_file, schema_form, training_run
from ui.components import presets as preset_fields
from ui.components.answers_run import Run, follow
from ui.errors import errors_shown, say
from ui.events import PRIVATE

KNOWN = schema_form.fields(TrainLanguageConfig)
NAMES = tuple(name for name in KNOWN if name != "data")
EMBEDDED = "smollm2"
LENGTHS = [("Quick try", "quick"), ("Normal", "normal")]
PRESET_FIELDS = tuple(sorted(presets.fields(TrainLanguageConfig.kind)))
COLUMNS = 7
"""Variants that fit side by side: the base and six adapters."""

Form = dict[str, Any]

CLIENT = Client()
"""The process that holds the model; the app itself never loads one."""


@dataclass
class Page:
    """What other pages may fill."""

    base: gr.Dropdown
    adapters: gr.Dropdown
    mode: gr.Radio
    view: list[Any]
    """Components that :func:`follow` fills."""

    @property
    def jobs_view(self) -> list[Any]:
        """Components that :func:`open_job` fills."""
        return [self.mode, *self.view]


def build() -> Page:
    """Draw the page inside the current tab."""
    with gr.Row(elem_classes="as-page"):
        with gr.Column(scale=4, min_width=320, elem_classes="as-form"):
            mode = gr.Radio([("Chat", "chat"), ("Train from a file", "train"), ("Compress", "compress")], value="chat",
                            show_label=False,
                            container=False, elem_classes="as-choices", elem_id="language-mode",
                            label="What to do")  # fmt: skip
            with gr.Group(elem_classes="as-card"):
                base = gr.Dropdown(
                    base_choices(), value=EMBEDDED, label="Language model", allow_custom_value=True, interactive=True,
                    info="From your library, or a hub id. smollm2 comes with the studio.", elem_id="language-base",
                )  # fmt: skip
            with gr.Column(elem_classes="as-form") as chat_side:
                adapters, together, sampling = _chat_settings()
            with gr.Column(elem_classes="as-form", visible=False) as train_side:
                form, drop, rows, preview, start = _train_settings(base)
            with gr.Column(elem_classes="as-form", visible=False) as compress_side:
                smaller = compressing.draw_settings(EMBEDDED)
        with gr.Column(scale=8, min_width=320) as chat_result:
            chat = _Chat.draw()
        with gr.Column(scale=8, min_width=320, visible=False) as compress_result:
            compressed = compressing.draw_result()
        with gr.Column(scale=8, min_width=320, visible=False, elem_id="language-result",
                       elem_classes="as-training-result") as train_result:  # fmt: skip
            result = Run.draw("language", _EMPTY, "Chat with it")
    mode.change(
        lambda chosen: [gr.update(visible=chosen == way) for way in ("chat", "train", "compress") for _ in range(2)],
        mode, [chat_side, chat_result, train_side, train_result, compress_side, compress_result], **PRIVATE,
    )  # fmt: skip
    _wire_chat(chat, base, adapters, together, sampling)
    _wire_train(form, base, drop, rows, preview, start, result)
    page = Page(base, adapters, mode, result.view)
    _wire_crossing(page, result)
    compressing.wire(smaller, compressed, base)
    compressed.use.click(errors_shown(_use_smaller), compressed.job, [mode, base, adapters], **PRIVATE)
    return page


def _use_smaller(job_id: str) -> Any:
    found = compressing.made(jobs.get(job_id))
    if found is None:
        raise InputError("What this job made is no longer in the library.")
    record, chosen = found
    return ["chat", gr.update(choices=base_choices(), value=record.name),
            gr.update(choices=adapter_choices(), value=chosen)]  # fmt: skip


def base_choices() -> list[tuple[str, str]]:
    """Usable language models; the embedded one also before it is unpacked."""
    names = {name: text for text, name in library_choices.bases("language")}
    return [(text, name) for name, text in ({EMBEDDED: f"{EMBEDDED}   llama"} | names).items()]


def adapter_choices() -> list[tuple[str, str]]:
    """Usable adapters of language models."""
    return library_choices.adapters("language")


# ------------------------------------------------------------------------------------------------ talking


def _chat_settings() -> tuple[gr.Dropdown, gr.Radio, Form]:
    with gr.Group(elem_classes="as-card"):
        adapters = gr.Dropdown(
            adapter_choices(), value=[], multiselect=True, label="Adapters", interactive=True,
            info="Choose from your library; none = the base alone.", elem_id="language-adapters",
        )  # fmt: skip
        together = gr.Radio(
            [("All at once", "together"), ("Side by side with the base", "compare")], value="together",
            label="Several adapters", elem_classes="as-choices", elem_id="language-compare",
        )  # fmt: skip
    sampling: Form = {}
    with gr.Group(elem_classes="as-card"):
        sampling["system"] = gr.Textbox(label="System message", lines=1, max_lines=4, value="",
                                      placeholder="How the model should behave (optional)",
                                      elem_id="language-system")  # fmt: skip
        with gr.Row():
            sampling["temperature"] = gr.Number(0.0, label="Temperature", minimum=0, maximum=5, step=0.1, min_width=100,
                                              info="0 = likeliest words")  # fmt: skip
            sampling["max_tokens"] = gr.Number(200, label="Longest answer", minimum=1, precision=0, min_width=100,
                                             info="tokens", elem_id="language-tokens")  # fmt: skip
            sampling["seed"] = gr.Number(0, label="Seed", minimum=0, precision=0, min_width=100,
                                         info="same seed, same answer")  # fmt: skip
    return adapters, together, sampling


@dataclass
class _Chat:
    """The conversations and what is written below them."""

    boxes: list[gr.Chatbot]
    status: gr.HTML
    message: gr.Textbox
    send: gr.Button
    stop: gr.Button
    clear: gr.Button

    @classmethod
    def draw(cls) -> _Chat:
        with gr.Row(equal_height=True, elem_id="language-variants"):
            boxes = [
                gr.Chatbot([], label="base", height=460, min_width=220, visible=number == 0, buttons=["copy_all"],
                           elem_id=f"language-variant-{number}", placeholder="Ask something below.",
                           feedback_options=None, allow_tags=False)
                for number in range(COLUMNS)
            ]  # fmt: skip
        status = gr.HTML("", elem_id="language-status", apply_default_css=False)
        message = gr.Textbox(label="Your message", lines=2, max_lines=8, placeholder="What is a heron?",
                             elem_id="language-message", info="Shift + Enter sends.")  # fmt: skip
        with gr.Row(elem_classes="as-actions-row"):
            send = gr.Button("Send", variant="primary", elem_id="language-send", scale=3)
            stop = gr.Button("Stop", variant="stop", elem_id="language-stop", scale=1, min_width=80)
            clear = gr.Button("New conversation", elem_id="language-clear", scale=2)
        return cls(boxes, status, message, send, stop, clear)


def variants(adapters: Sequence[str] | None, together: str) -> tuple[Variant, ...]:
    """The variants that answer; raises :class:`InputError` when they do not fit side by side."""
    found = variants_of([(name, 1.0) for name in adapters or ()], together == "compare")
    if len(found) > COLUMNS:
        raise InputError(f"Side by side there is room for {COLUMNS - 1} adapters: remove some.")
    return found


def _wire_chat(chat: _Chat, base: gr.Dropdown, adapters: gr.Dropdown, together: gr.Radio, sampling: Form) -> None:
    @errors_shown
    def fresh(chosen: list[str], how: str) -> Any:
        """Empty conversations under the names of the variants."""
        present = variants(chosen, how)
        return [
            gr.update(
                value=[], visible=number < len(present), label=present[number].name if number < len(present) else ""
            )
            for number in range(COLUMNS)
        ] + [""]

    def ask(
        text: str, name: str, chosen: list[str], how: str, system: str, temperature: float, tokens: float, seed: float,
        *talks: list[Message],
    ) -> Iterator[Any]:  # fmt: skip
        kept = [plain(talk) for talk in talks]
        try:
            if not (text or "").strip():
                raise InputError("Write a message first.")
            present = variants(chosen, how)
            values = {"temperature": float(temperature or 0), "max_tokens": int(tokens or 200), "seed": int(seed or 0)}
            yield from _answers(text.strip(), str(name or EMBEDDED), present, system or "", values, kept)
        except StudioError as error:
            say(str(error))
            yield [text, markup.notice(str(error)), *kept]

    inputs = [
        chat.message,
        base,
        adapters,
        together,
        *(sampling[n] for n in ("system", "temperature", "max_tokens", "seed")),
    ]
    outputs = [chat.message, chat.status, *chat.boxes]
    for begin in (chat.send.click, chat.message.submit):
        begin(ask, [*inputs, *chat.boxes], outputs, **PRIVATE)
    chat.stop.click(errors_shown(lambda: CLIENT.stop()), None, None, queue=False, **PRIVATE)
    for changed in (adapters.change, together.change, base.change, chat.clear.click):
        changed(fresh, [adapters, together], [*chat.boxes, chat.status], **PRIVATE)


def plain(talk: Sequence[Mapping[str, Any]] | None) -> list[Message]:
    """A chat box's messages as role and text."""
    found = []
    for message in talk or ():
        content = message.get("content")
        if isinstance(content, list):  # parts, as newer versions of the chat box keep them
            content = "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content)
        found.append({"role": str(message["role"]), "content": str(content or "")})
    return found


def _answers(
    text: str,
    base: str,
    present: tuple[Variant, ...],
    system: str,
    sampling: Mapping[str, Any],
    kept: list[list[Message]],
) -> Iterator[Any]:
    """The boxes as the answers come in; the message field is emptied at once."""
    boxes = [[*talk, {"role": "user", "content": text}] for talk in kept[: len(present)]]
    start = [{"role": "system", "content": system}] if system.strip() else []
    question = Question(base, present, tuple((*start, *box) for box in boxes), sampling=sampling)
    rest = [gr.skip()] * (COLUMNS - len(present))
    yield ["", _status(f"asking {base} ..."), *boxes, *rest]
    with closing(CLIENT.ask(question)) as events:
        remarks = ""
        for event in events:
            if event["event"] == "begin":
                boxes[event["variant"]].append({"role": "assistant", "content": ""})
            elif event["event"] == "piece":
                boxes[event["variant"]][-1]["content"] += event["text"]
            elif event["event"] == "remark":
                remarks += markup.notice(event["text"], "info")
            shown = event["text"] if event["event"] == "loading" else "answering ..."
            yield ["", remarks + _status(shown), *boxes, *rest]
    yield ["", remarks, *boxes, *rest]


def _status(text: str) -> str:
    return f'<p class="as-help" role="status">{markup.text(text)}</p>'


# ------------------------------------------------------------------------------------------------ training


def _train_settings(base: gr.Dropdown) -> tuple[Form, gr.File, gr.State, gr.HTML, gr.Button]:
    form: Form = {}
    with gr.Group(elem_classes="as-card"):
        gr.HTML(markup.heading("Rows", "A file of prompts with completions, conversations, texts or labelled texts."),
                apply_default_css=False)  # fmt: skip
        drop = gr.File(
            label="Drop a file here", file_types=rows_file.TYPES, height=110,
            elem_id="language-drop", show_label=False,
        )  # fmt: skip
        rows = gr.State("")
        preview = gr.HTML("", elem_id="language-preview", apply_default_css=False)
    with gr.Group(elem_classes="as-card"):
        form["preset"] = gr.Radio(LENGTHS, value="normal", label="How long", elem_classes="as-choices",
                                  elem_id="language-preset")  # fmt: skip
        for pair in (("name", "task"), ("steps", "rank"), ("learning_rate", "batch_size"),
                     ("max_length", "validation_split")):  # fmt: skip
            with gr.Row():
                for name in pair:
                    start_value = {"value": "my-adapter"} if name == "name" else {}
                    form[name] = schema_form.widget(
                        KNOWN[name], elem_id=f"language-{name}", min_width=140, **start_value
                    )
        for name in ("system_prompt", "sample_prompts", "packing"):
            form[name] = schema_form.widget(KNOWN[name], elem_id=f"language-{name.replace('_', '-')}")
    for group, names in schema_form.groups(KNOWN, [*form, "base", "data"]).items():
        with gr.Accordion(group, open=False, elem_classes="as-more"):
            place = gr.Column() if group == "Method" else None
            for name in names:
                form[name] = method_help.widget(KNOWN[name], "language") if place else schema_form.widget(KNOWN[name])
        if place:
            methods = place
    with methods:
        method_help.watch(form, KNOWN, "language")
    form["preset"].input(preset_values, form["preset"], [form[name] for name in PRESET_FIELDS], **PRIVATE)
    with gr.Row(elem_classes="as-actions"):
        start = gr.Button("Start training", variant="primary", elem_id="language-start", scale=3)
        ask = gr.Button("Memory and time", elem_id="language-estimate", scale=1, min_width=120)
    needs = gr.HTML("", elem_id="language-needs", elem_classes="as-help", apply_default_css=False)
    ask.click(errors_shown(needed), [rows, base, *(form[name] for name in NAMES if name != "base")], needs, **PRIVATE)
    return form, drop, rows, preview, start


def preset_values(preset: str) -> list[Any]:
    """Widget values of :data:`PRESET_FIELDS` for a preset."""
    return preset_fields.values(TrainLanguageConfig.kind, KNOWN, PRESET_FIELDS, preset, EMBEDDED)


def config_of(data: str, base: str, values: Sequence[Any]) -> TrainLanguageConfig:
    """The job of a filled form; raises :class:`InputError` for what cannot work."""
    if not data:
        raise InputError("There are no rows yet: drop a file first.")
    names = [name for name in NAMES if name != "base"]
    config = schema_form.read_all(KNOWN, names, values)
    return TrainLanguageConfig.parse({**config, "base": base or EMBEDDED, "data": data}, source="the form")


def needed(data: str, base: str, *values: Any) -> str:
    """What the form's training would need, as a line of HTML."""
    from studio.processes import apart
    from studio.training import estimate

    config = config_of(data, base, values)
    ready.language(config)
    return markup.text(estimate.sentence(apart(estimate.estimated, config)))


_EMPTY = markup.empty(
    "Your training appears here",
    "Drop a file of rows, give the adapter a name, and start. Loss, measures and answers appear while it learns.",
)


def _wire_train(
    form: Form, base: gr.Dropdown, drop: gr.File, rows: gr.State, preview: gr.HTML, start: gr.Button, result: Run
) -> None:
    @errors_shown
    def dropped(file: str | None, task: str) -> Any:
        if not file:
            return "", ""
        place = rows_file.keep(file)
        try:
            return str(place), rows_file.describe(place, task)
        except StudioError as error:
            return str(place), markup.notice(str(error))

    @errors_shown
    def look_again(data: str, task: str) -> Any:
        try:
            return rows_file.describe(Path(data), task) if data else ""
        except StudioError as error:
            return markup.notice(str(error))

    drop.change(dropped, [drop, form["task"]], [rows, preview], **PRIVATE)
    form["task"].change(look_again, [rows, form["task"]], preview, **PRIVATE)
    fields = [form[name] for name in NAMES if name != "base"]
    result.follow_job(start, lambda data, name, *values: config_of(data, name, values), [rows, base, *fields])


def _wire_crossing(page: Page, result: Run) -> None:
    @errors_shown
    def talk(job_id: str) -> Any:
        job = jobs.get(job_id)
        name = training_run.add_to_library(job)
        return ["chat", job.config.get("base") or EMBEDDED, gr.update(choices=adapter_choices(), value=[name])]

    result.talk.click(talk, result.job, [page.mode, page.base, page.adapters], **PRIVATE)


def use(record: library.Record) -> list[Any]:
    """Values of mode, base and adapters that put a library item to use."""
    if record.kind == "base":
        return ["chat", record.name, gr.skip()]
    return ["chat", gr.skip(), gr.update(choices=adapter_choices(), value=[record.name])]


def open_job(job_id: str, shown: tuple[Any, ...]) -> list[Any]:
    """Values of :attr:`Page.jobs_view`."""
    return ["train", *follow(job_id, shown)]
