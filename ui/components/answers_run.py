"""A training whose answers are read: progress, loss, routers, measures, and the answers while it learns.

Shared by the pages of language and vision-language models; ``prefix`` keeps their element ids apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio import jobs
from studio.jobs import Job
from studio.schema import JobConfig
from studio.training import ready, saved
from ui import markup
from ui.components import job_panel, loss_plot, router_plot, training_run
from ui.errors import errors_shown, say
from ui.events import PRIVATE

SECONDS = 1.0


@dataclass
class Run:
    """The right side of a page that starts such trainings; ``talk`` puts the adapter to use."""

    job: gr.State
    timer: gr.Timer
    panel: gr.HTML
    plot: gr.HTML
    answers: gr.HTML
    cancel: gr.Button
    resume: gr.Button
    talk: gr.Button
    empty: str

    @classmethod
    def draw(cls, prefix: str, empty: str, talk: str) -> Run:
        """Draw it; ``empty`` is shown until there is a training, ``talk`` is the button's text."""
        job = gr.State("")
        timer = gr.Timer(SECONDS, active=False)
        panel = gr.HTML(empty, elem_id=f"{prefix}-panel", apply_default_css=False)
        with gr.Row(elem_classes="as-actions-row"):
            cancel = gr.Button(_CANCEL, variant="stop", visible=False, size="md", elem_id=f"{prefix}-cancel")
            resume = gr.Button("Resume", visible=False, size="md", elem_id=f"{prefix}-resume")
            use = gr.Button(talk, variant="primary", visible=False, size="md", elem_id=f"{prefix}-talk")
        plot = gr.HTML("", elem_id=f"{prefix}-plot", apply_default_css=False)
        answered = gr.HTML("", elem_id=f"{prefix}-answers", apply_default_css=False)
        return cls(job, timer, panel, plot, answered, cancel, resume, use, empty)

    @property
    def view(self) -> list[Any]:
        return [self.job, self.timer, self.panel, self.plot, self.answers, self.cancel, self.resume, self.talk]

    def follow_job(self, start: gr.Button, config_of: Callable[..., JobConfig], inputs: list[Any]) -> None:
        """Let ``start`` submit the job of ``config_of(*inputs)`` and follow it."""

        @errors_shown
        def begin(*values: Any) -> Any:
            config: Any = config_of(*values)
            job_id = jobs.submit(config.kind, config)
            jobs.ensure_worker()
            if remark := ready.remark(config):
                say(remark, title="Different bases")
            return follow(job_id)

        def gone() -> list[Any]:
            return ["", gr.Timer(active=False), self.empty, "", "", *[gr.update(visible=False)] * 3]

        start.click(begin, inputs, self.view, **PRIVATE)
        start.click(None, None, None, js=training_run.TO_RESULT)
        job_panel.steer(job_panel.Area(self.job, self.timer, self.cancel, self.view, self.resume), follow, gone)


_CANCEL = "Cancel and keep what is learnt"


def follow(job_id: str, shown: tuple[Any, ...] = ()) -> Any:
    """Values of :attr:`Run.view` for a training."""
    if not job_id:
        return gr.skip()
    job = jobs.get(job_id)
    name = training_run.in_library(job)
    kept = markup.notice(f"The adapter is in your library as '{name}'.", "info") if name else ""
    answers_questions = job.kind == "train-vision-language" or job.config.get("task") == "causal"
    usable = not job.active and bool(saved.steps(job)) and answers_questions
    return [
        job.id, gr.Timer(active=job.active), job_panel.job_panel(job, job_panel.ahead(job)),
        kept + loss_plot.of_job(job) + router_plot.of_job(job) + _measures(job),
        answers(job), gr.update(visible=job.active, value="Stop now" if job.status == "cancelling" else _CANCEL),
        gr.update(visible=job.status in ("cancelled", "interrupted", "failed")), gr.update(visible=usable),
    ]  # fmt: skip


def _measures(job: Job) -> str:
    """The latest measures on the held-out rows."""
    found = (job.result or {}).get("validation") or []
    if not found:
        return ""
    last = found[-1]
    names = {"validation_loss": "Validation loss", "perplexity": "Perplexity", "accuracy": "Accuracy",
             "macro_f1": "Macro F1", "exact_answers": "Exact answers"}  # fmt: skip
    return markup.facts((title, f"{last[name]:.4g}") for name, title in names.items() if name in last)


def answers(job: Job) -> str:
    """The answers to the sample prompts so far, newest first."""
    file = job.folder / "answers.jsonl"
    if not file.is_file():
        return ""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = "".join(
        f"<tr><td>{line['step']}</td><td>{markup.text(line['prompt'])}</td><td>{markup.text(line['answer'])}"
        f"{_expected(line)}</td></tr>"
        for line in reversed(lines[-40:])
    )
    return (
        '<section class="as-answers"><h3>Answers while it learns</h3><table><thead><tr><th>Step</th><th>Prompt</th>'
        f"<th>Answer</th></tr></thead><tbody>{rows}</tbody></table></section>"
    )


def _expected(line: dict[str, Any]) -> str:
    return f" <small>(expected: {markup.text(line['expected'])})</small>" if line.get("expected") else ""
