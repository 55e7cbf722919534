"""Speech: record or drop a sound, and see its text with times, from a Whisper with and without adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

import assets
from adapters.errors import InputError
from studio import jobs, library
from studio.jobs import Job
from studio.library import whisper_tiny
from studio.transcription.schema import TranscribeConfig
from ui import dropped, markup, pictures
from ui.components import job_panel, library_choices, schema_form, training_run
from ui.errors import errors_shown
from ui.events import PRIVATE

FAMILY = "speech"
KIND = TranscribeConfig.kind
KNOWN = schema_form.fields(TranscribeConfig)
MORE = ("language", "task", "times", "window")
SECONDS = 0.8
EXAMPLE = ("speech/example.ogg", "The small dog carries a red ball across the garden.")
"""A sound that comes with the studio, and what is said in it."""

_EMPTY = markup.empty("Transcripts appear here", "Record something, drop a sound or video, or try the example.")


@dataclass
class Page:
    """What other pages may fill, and what :func:`follow` fills."""

    base: gr.Dropdown
    adapters: gr.Dropdown
    view: list[Any]


def base_choices() -> list[tuple[str, str]]:
    """Usable speech models; the packaged one also before it is unpacked."""
    listed = library_choices.bases(FAMILY)
    here = any(name == whisper_tiny.NAME for _, name in listed)
    return listed if here else [(f"{whisper_tiny.NAME}   fetched on first use", whisper_tiny.NAME), *listed]


def adapter_choices() -> list[tuple[str, str]]:
    """Usable adapters of speech models."""
    return library_choices.adapters(FAMILY)


def example() -> Path | None:
    """The sound that comes with the studio; None where it is missing."""
    try:
        return assets.path(EXAMPLE[0])
    except FileNotFoundError:
        return None


def build() -> Page:
    """Draw the page inside the current tab."""
    with gr.Row(elem_classes="as-page"):
        with gr.Column(scale=4, min_width=320, elem_classes="as-form"):
            with gr.Group(elem_classes="as-card"):
                heard = gr.Audio(sources=["upload", "microphone"], type="filepath", label="Sound",
                                 elem_id="speech-sound")  # fmt: skip
                reference = gr.Textbox(
                    label="What was really said", lines=2, max_lines=6, value="", elem_id="speech-reference",
                    info="If you know it: wrong words and characters are counted.",
                )  # fmt: skip
                sample = gr.Button("Write down the example", size="md", elem_id="speech-example",
                                   visible=example() is not None)  # fmt: skip
            with gr.Group(elem_classes="as-card"):
                base = gr.Dropdown(base_choices(), value=whisper_tiny.NAME, label="Whisper", allow_custom_value=True,
                                   interactive=True, info=KNOWN["base"].help, elem_id="speech-base")  # fmt: skip
                adapters = gr.Dropdown(adapter_choices(), value=[], multiselect=True, label="Adapters",
                                       interactive=True, info="Choose from your library; none = the base alone.",
                                       elem_id="speech-adapters")  # fmt: skip
                how = gr.Radio([("Side by side with the base", "compare"), ("All at once", "together")],
                               value="compare", label="With adapters", elem_classes="as-choices",
                               elem_id="speech-compare")  # fmt: skip
            with gr.Accordion("More", open=False, elem_classes="as-card"):
                form = {name: schema_form.widget(KNOWN[name], elem_id=f"speech-{name}") for name in MORE}
            with gr.Row(elem_classes="as-actions"):
                start = gr.Button("Transcribe", variant="primary", elem_id="speech-start", scale=3)
                cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id="speech-cancel", scale=1)
        with gr.Column(scale=8, min_width=320, elem_id="speech-result", elem_classes="as-training-result"):
            job, timer = gr.State(""), gr.Timer(SECONDS, active=False)
            panel = gr.HTML(_EMPTY, elem_id="speech-panel", apply_default_css=False)
            resume = gr.Button("Start again", visible=False, size="md", elem_id="speech-resume")
            said = gr.HTML("", elem_id="speech-said", apply_default_css=False)
            kept = gr.Files(label="Files", visible=False, interactive=False, elem_id="speech-files")
    view = [job, timer, panel, cancel, resume, said, kept]
    values_of = [reference, base, adapters, how, *form.values()]

    def begin(place: Path, words: str, *values: Any) -> list[Any]:
        asked = dict(zip(("base", "adapters", "compare", *form), values, strict=True))
        chosen = {**asked, "adapters": asked["adapters"] or [], "compare": bool(asked["adapters"]) and how_is(asked)}
        named = {"sound": str(place), "name": place.stem[:80] or "transcript", "reference": words or ""}
        job_id = jobs.submit(KIND, TranscribeConfig.parse({**chosen, **named}, source="the form"))
        jobs.ensure_worker()
        return follow(job_id, ())

    @errors_shown
    def started(file: str | None, *values: Any) -> Any:
        if not file:
            raise InputError("There is no sound yet: record something, drop a sound or video, or try the example.")
        return begin(dropped.keep(file, "sound"), *values)

    @errors_shown
    def try_example(*values: Any) -> Any:
        place = example()
        if place is None:
            raise InputError("The example is missing.")
        return [str(pictures.taken(place.name, place)), EXAMPLE[1], *begin(place, EXAMPLE[1], *values[1:])]

    def gone() -> list[Any]:
        off = gr.update(visible=False)
        return ["", gr.Timer(active=False), _EMPTY, off, off, "", off]

    for button in (start, sample):
        button.click(None, None, None, js=training_run.TO_RESULT)
    start.click(started, [heard, *values_of], view, **PRIVATE)
    sample.click(try_example, values_of, [heard, reference, *view], **PRIVATE)
    job_panel.steer(job_panel.Area(job, timer, cancel, view, resume), follow, gone)
    return Page(base, adapters, view)


def how_is(asked: Mapping[str, Any]) -> bool:
    """Whether adapters are to be compared with the base."""
    return bool(asked["compare"] == "compare")


def follow(job_id: str, shown: tuple[Any, ...]) -> list[Any]:
    """The right side for a job."""
    if not job_id:
        return [gr.skip()] * 7
    job = jobs.get(job_id)
    done = job.status == "done" and job.result is not None
    listed = [file for one in (job.result or {}).get("transcripts", ()) for file in one["files"].values()]
    there = [file for file in listed if Path(file).is_file()] if done else []
    return [
        job.id, gr.Timer(active=job.active), job_panel.job_panel(job, job_panel.ahead(job)),
        gr.update(visible=job.active), gr.update(visible=job.status in ("cancelled", "interrupted", "failed")),
        results(job) if done else "", gr.update(value=there or None, visible=bool(there)),
    ]  # fmt: skip


def results(job: Job) -> str:
    """The transcripts of a finished job, side by side, with their errors and times."""
    result = job.result or {}
    remarks = "".join(markup.notice(f"The sound: {remark}.", "info") for remark in result["sound"]["remarks"])
    cards = "".join(map(_card, result["transcripts"]))
    return f'{remarks}<section class="as-said-cards" aria-live="polite">{cards}</section>'


def _card(one: Mapping[str, Any]) -> str:
    score = one["score"]
    errors = ""
    if score:
        shown = [("Words wrong", f"{score['wer']:.1%}"), ("Characters wrong", f"{score['cer']:.1%}")]
        errors = markup.facts(shown) + (markup.notice("It repeats itself.", "info") if score["loops"] else "")
    rows = "".join(
        f"<tr><td>{segment['start']:.1f} - {segment['end']:.1f} s</td><td>{markup.text(segment['text'])}</td></tr>"
        for segment in one["segments"]
    )
    times = f'<table class="as-answers">{rows}</table>' if len(one["segments"]) > 1 else ""
    text = markup.text(one["text"]) or "<em>nothing was heard</em>"
    return f"<article><h4>{markup.text(one['variant'])}</h4><p>{text}</p>{errors}{times}</article>"


def use(record: library.Record) -> list[Any]:
    """Values of base and adapters that put a library item to use."""
    if record.kind == "base":
        return [record.name, gr.skip()]
    return [gr.skip(), gr.update(choices=adapter_choices(), value=[record.name])]
