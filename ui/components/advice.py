"""The doctor's advice on the adapters in the rack, shown below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio import catalogue
from studio.inspection import doctor
from ui import markup
from ui.components.rack import Row
from ui.errors import errors_shown
from ui.events import PRIVATE

TONES = {"none": "good", "low": "good", "medium": "wait", "high": "bad"}
MOST = 6
"""How many pairs are shown, the worst first."""



@dataclass
class Advice:
    """The button that asks, the advice, and the button that follows it."""

    ask: gr.Button
    told: gr.HTML
    follow: gr.Button
    report: gr.State
    """The doctor's advice as plain values; None before it was asked."""


def draw() -> Advice:
    """Draw it inside the current group."""
    ask = gr.Button("Will they get along?", size="md", visible=False, elem_id="ask-doctor")
    told = gr.HTML("", elem_id="doctor", apply_default_css=False)
    follow = gr.Button("Follow this advice", size="md", visible=False, elem_id="follow-doctor")
    return Advice(ask, told, follow, gr.State(None))


def wire(advice: Advice, rack: gr.HTML, prompt: gr.Textbox, regions: gr.HTML) -> None:
    """Ask on request, with the prompts of the picture and its regions; clear the advice when adapters change."""
    view = [advice.ask, advice.told, advice.follow, advice.report]

    @errors_shown
    def offer(rows: list[Row], known: Mapping[str, Any] | None) -> Any:
        if known and known["asked"] == _asked(rows):
            return [gr.skip()] * 4
        return [gr.update(visible=len(rows or ()) > 1), "", gr.update(visible=False), None]

    @errors_shown
    def ask(rows: list[Row], prompt: str, drawn: list[Mapping[str, Any]] | None) -> Any:
        names, weights = zip(*_asked(rows), strict=True)
        words = " ".join([prompt or "", *(str(one.get("prompt") or "") for one in drawn or ())])
        found = doctor.report_apart(names, words, weights)
        advised = found["advice"]
        new = any(advised["weights"].get(name) != weight for name, weight in _asked(rows))
        useful = new or advised["regions"] or advised["method"] in _offered()
        return [gr.skip(), panel(found), gr.update(visible=useful), {"asked": _asked(rows), **advised}]

    rack.change(offer, [rack, advice.report], view, **PRIVATE)
    advice.ask.click(lambda: _WAIT, None, advice.told, **PRIVATE).then(
        ask, [rack, prompt, regions], view, **PRIVATE
    ).then(lambda told: "" if told == _WAIT else gr.skip(), advice.told, advice.told, **PRIVATE)


def followed(rows: Sequence[Row] | None, report: Mapping[str, Any] | None) -> tuple[list[Row], str, bool]:
    """Rows with the advised weights, the advised method (empty if Compose lacks it), and whether to draw regions."""
    if not report:
        return list(rows or ()), "", False
    weights = report["weights"]
    changed = [{**row, "weight": weights.get(row["name"], row["weight"])} for row in rows or ()]
    method = str(report["method"])
    return changed, method if method in _offered() else "", bool(report["regions"])


def panel(found: Mapping[str, Any]) -> str:
    """The doctor's report as HTML."""
    pairs = "".join(_pair(pair) for pair in found["pairs"][:MOST])
    more = len(found["pairs"]) - MOST
    rest = f"<p>and {more} milder pairs</p>" if more > 0 else ""
    advised = found["advice"]
    weights = ", ".join(f"{name} {weight:g}" for name, weight in advised["weights"].items())
    way = f"{_title(advised['method'])}, with a region for each" if advised["regions"] else _title(advised["method"])
    reasons = "".join(f"<p>{markup.text(reason)}</p>" for reason in [*advised["reasons"], *found["remarks"]])
    return (
        f'<section class="as-doctor" aria-label="Advice on these adapters"><ul>{pairs}</ul>{rest}'
        f"<p><b>{markup.text(way)}</b> at {markup.text(weights)}</p>{reasons}</section>"
    )


def _pair(pair: Mapping[str, Any]) -> str:
    level = str(pair["level"])
    shared = f"{pair['interference']:.0%} shared" if pair["common"] else "different layers"
    return (
        f"<li><span>{markup.text(pair['first'])} + {markup.text(pair['second'])}</span>"
        f"<small>{shared}</small>{markup.tag(f'{level} conflict', TONES.get(level, ''))}</li>"
    )


def _asked(rows: Sequence[Row] | None) -> list[tuple[str, float]]:
    return [(str(row["name"]), float(row.get("weight", 1.0))) for row in rows or ()]


def _offered() -> list[str]:
    return [method.name for method in catalogue.stage("compose")]


def _title(name: str) -> str:
    return next((method.title or name for method in catalogue.declared() if method.name == name), name)


_WAIT = '<p class="as-doctor-wait" role="status">Comparing the weights of the adapters…</p>'
