"""Classify RNA: a FASTA file in, a label and a probability for every transcript out, with table and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio import jobs, library
from studio.genomics.schema import ADAPTER, BASE, ClassifyRnaConfig
from studio.jobs import Job
from ui import dropped, markup
from ui.components import job_panel, library_choices, rna_plots, schema_form, training_run
from ui.errors import errors_shown
from ui.events import PRIVATE

FAMILY = "rna"
KIND = ClassifyRnaConfig.kind
KNOWN = schema_form.fields(ClassifyRnaConfig)
TYPES = [".fa", ".fasta", ".fna", ".ffn", ".gz", ".bz2", ".xz", ".zst", ".txt"]
MORE = ("view", "long", "threshold", "shortest")
SECONDS = 0.8
SHOWN = 50
"""Rows of the table on the page; the file has all of them."""

_EMPTY = markup.empty("Transcripts appear here", "Drop a FASTA file, or try the example.")
_COLUMNS = {"id": "Transcript", "length": "nt", "label": "Label", "p": "Probability", "orf_length": "ORF nt",
            "orf_coverage": "ORF share", "remark": "Remark"}  # fmt: skip


@dataclass
class Page:
    """What other pages may fill, and what :func:`follow` fills."""

    base: gr.Dropdown
    adapter: gr.Dropdown
    view: list[Any]


def base_choices() -> list[tuple[str, str]]:
    """Usable k-mer models."""
    return library_choices.bases(FAMILY)


def adapter_choices() -> list[tuple[str, str]]:
    """Usable adapters of k-mer models, and none."""
    return [("none: the model's own classifier", ""), *library_choices.adapters(FAMILY)]


def example() -> Path | None:
    """The transcripts that come with the embedded model."""
    place = next((record.path for record in library.bases() if record.name == BASE), None)
    file = place / "examples" / "demo.fa" if place else None
    return file if file is not None and file.is_file() else None


def build() -> Page:
    """Draw the page inside the current tab."""
    shown = example()
    with gr.Row(elem_classes="as-page"):
        with gr.Column(scale=4, min_width=320, elem_classes="as-form"):
            with gr.Group(elem_classes="as-card"):
                drop = gr.File(label="FASTA file of transcripts", height=140, elem_id="rna-drop", file_types=TYPES)
                chosen = gr.HTML("", elem_id="rna-chosen", elem_classes="as-help", apply_default_css=False)
                file = gr.State("")
                sample = gr.Button("Classify the example", size="md", elem_id="rna-example", visible=bool(shown))
            with gr.Group(elem_classes="as-card"):
                base = gr.Dropdown(base_choices(), value=BASE, label="K-mer model", allow_custom_value=True,
                                   interactive=True, info=KNOWN["base"].help, elem_id="rna-base")  # fmt: skip
                adapter = gr.Dropdown(adapter_choices(), value=ADAPTER, label="Adapter", allow_custom_value=True,
                                      interactive=True, info="What tells transcripts apart.",
                                      elem_id="rna-adapter")  # fmt: skip
            with gr.Accordion("More", open=False, elem_classes="as-card"):
                form = {name: schema_form.widget(KNOWN[name], elem_id=f"rna-{name}") for name in MORE}
            with gr.Row(elem_classes="as-actions"):
                start = gr.Button("Classify", variant="primary", elem_id="rna-start", scale=3)
                cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id="rna-cancel", scale=1)
        with gr.Column(scale=8, min_width=320, elem_id="rna-result", elem_classes="as-training-result"):
            job, timer = gr.State(""), gr.Timer(SECONDS, active=False)
            panel = gr.HTML(_EMPTY, elem_id="rna-panel", apply_default_css=False)
            with gr.Row(elem_classes="as-actions-row"):
                resume = gr.Button("Resume", visible=False, size="md", elem_id="rna-resume")
                download = gr.DownloadButton("Download the table", visible=False, size="md", elem_id="rna-download")
            plots = gr.HTML("", elem_id="rna-plots", apply_default_css=False)
    view = [job, timer, panel, cancel, resume, download, plots]
    settings_of = [base, adapter, *form.values()]

    def begin(place: str, *values: Any) -> Any:
        asked = dict(zip(("base", "adapter", *form), values, strict=True))
        asked["adapter"] = asked["adapter"] or ""
        config = ClassifyRnaConfig.parse({**asked, "file": place}, source="the form")
        job_id = jobs.submit(KIND, config)
        jobs.ensure_worker()
        return follow(job_id, ())

    @errors_shown
    def started(place: str, *values: Any) -> Any:
        if not place:
            raise InputError("There are no transcripts yet: drop a FASTA file, or try the example.")
        return begin(place, *values)

    @errors_shown
    def try_example(*values: Any) -> Any:
        found = example()
        if found is None:
            raise InputError(f"The example of '{BASE}' is missing.")
        return [_told(found), str(found), *begin(str(found), *values)]

    @errors_shown
    def taken(path: str | None) -> Any:
        if not path:
            return gr.skip()
        place = dropped.keep(path, "fasta")
        return None, str(place), _told(place)

    def gone() -> list[Any]:
        off = gr.update(visible=False)
        return ["", gr.Timer(active=False), _EMPTY, off, off, off, ""]

    drop.upload(taken, drop, [drop, file, chosen], **PRIVATE)
    for button in (start, sample):
        button.click(None, None, None, js=training_run.TO_RESULT)
    start.click(started, [file, *settings_of], view, **PRIVATE)
    sample.click(try_example, settings_of, [chosen, file, *view], **PRIVATE)
    job_panel.steer(job_panel.Area(job, timer, cancel, view, resume), follow, gone)
    return Page(base, adapter, view)


def _told(file: Path) -> str:
    return f"<p><strong>{markup.text(file.name)}</strong> · {markup.file_size(file.stat().st_size)}</p>"


def follow(job_id: str, shown: tuple[Any, ...]) -> list[Any]:
    """The right side for a job."""
    if not job_id:
        return [gr.skip()] * 7
    job = jobs.get(job_id)
    done = job.status == "done" and job.result is not None
    table = Path((job.result or {}).get("table", "")) if done else None
    return [
        job.id, gr.Timer(active=job.active), job_panel.job_panel(job, job_panel.ahead(job)),
        gr.update(visible=job.active), gr.update(visible=job.status in ("cancelled", "interrupted", "failed")),
        gr.update(visible=True, value=str(table)) if table and table.is_file() else gr.update(visible=False),
        results(job) if done else "",
    ]  # fmt: skip


def results(job: Job) -> str:
    """Counts, remarks, plots and the first rows of a finished job."""
    result = job.result or {}
    labels, summary = result["labels"], Path(result["summary"])
    rows = json.loads(summary.read_text(encoding="utf-8"))["rows"] if summary.is_file() else []
    counted = [(label, f"{result['counts'].get(label, 0)}") for label in reversed(labels)]
    facts = markup.facts([("Transcripts", str(result["transcripts"])), *counted, ("Left out", str(result["skipped"]))])
    remarks = "".join(markup.notice(f"{remark}.", "info") for remark in result["remarks"])
    drawn = rna_plots.histogram(result["histogram"], labels, result["threshold"]) + rna_plots.orf_map(rows, labels)
    return f'<div class="as-rna-results">{facts}{remarks}{drawn}{table(rows, labels)}</div>'


def table(rows: Sequence[Mapping[str, str]], labels: Sequence[str]) -> str:
    """The first rows as a table."""
    heads = "".join(f"<th>{title}{f' of {markup.text(labels[1])}' if key == 'p' else ''}</th>"
                    for key, title in _COLUMNS.items())  # fmt: skip
    body = "".join(f"<tr>{''.join(_cell(row, key, labels) for key in _COLUMNS)}</tr>" for row in rows[:SHOWN])
    more = f"<p>The first {SHOWN} rows; the file has all.</p>" if len(rows) > SHOWN else ""
    return (
        '<section class="as-answers as-rna-table" tabindex="0" aria-label="Table of transcripts"><table><thead><tr>'
        f"{heads}</tr></thead><tbody>{body}</tbody></table>{more}</section>"
    )


def _cell(row: Mapping[str, str], key: str, labels: Sequence[str]) -> str:
    if key == "label":
        tone = "work" if row["label"] == labels[1] else "good"
        return f"<td>{markup.tag(row['label'], tone) if row['label'] else '—'}</td>"
    value = row[f"p_{labels[1]}"] if key == "p" else row[key]
    if key in ("p", "orf_coverage") and value:
        value = f"{float(value):.3f}"
    return f"<td>{markup.text(value) if value or key == 'remark' else '—'}</td>"


def use(record: library.Record) -> list[Any]:
    """Values of base and adapter that put a library item to use."""
    if record.kind == "base":
        return [record.name, gr.update(value="" if _classifies(record) else ADAPTER)]
    return [gr.skip(), gr.update(choices=adapter_choices(), value=record.name)]


def _classifies(record: library.Record) -> bool:
    """Whether a base has a classifier of its own."""
    return "SequenceClassification" in str(record.notes.get("heads", ""))
