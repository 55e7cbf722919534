"""The Library page's view of an adapter's intruder dimensions, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio.inspection import experts, intruders
from studio.processes import apart
from ui import markup
from ui.components import softening
from ui.components.inspected import base_choice, chosen_adapter
from ui.errors import errors_shown
from ui.events import PRIVATE

EPS = 0.5


@dataclass
class Spectrum:
    """The accordion, its inputs, and the report."""

    fold: gr.Accordion
    base: gr.Dropdown
    k: gr.Number
    eps: gr.Slider
    ask: gr.Button
    told: gr.HTML
    report: gr.State
    """The report as plain values; None before it was asked for."""
    softening: softening.Softening


def draw() -> Spectrum:
    """Draw it inside the current column, hidden until an adapter is chosen."""
    with gr.Accordion("What training changed", open=False, visible=False, elem_classes="as-more",
                      elem_id="spectrum") as fold:  # fmt: skip
        gr.HTML(
            "<p>Intruder dimensions: large directions of a weight that the base does not have. Many of them come with "
            "forgetting.</p>", elem_classes="as-help", apply_default_css=False,
        )  # fmt: skip
        with gr.Row():
            base = gr.Dropdown([], label="Base it was trained on", allow_custom_value=True, interactive=True,
                               min_width=150, elem_id="spectrum-base")  # fmt: skip
            k = gr.Number(10, label="Directions per layer", minimum=1, precision=0, min_width=100,
                          elem_id="spectrum-k")  # fmt: skip
        eps = gr.Slider(0.05, 1.0, EPS, step=0.05, label="Intruder below", elem_id="spectrum-eps",
                        info="similarity to the closest direction of the base")  # fmt: skip
        ask = gr.Button("Inspect its layers", size="md", elem_id="spectrum-ask")
        told = gr.HTML("", elem_id="spectrum-told", apply_default_css=False)
        below = softening.draw()
    return Spectrum(fold, base, k, eps, ask, told, gr.State(None), below)


def wire(spectrum: Spectrum, chosen: gr.State, shelf: gr.Radio) -> None:
    """Show it for the chosen adapter (not for a mixture) and inspect on request; changing ``eps`` only recolours."""

    @errors_shown
    def offer(name: str, shown: str) -> Any:
        record = chosen_adapter(name, shown)
        if record is None or experts.is_mixture(record.path):
            return [gr.update(visible=False), gr.skip(), "", None]
        return [gr.update(visible=True), base_choice(record), "", None]

    @errors_shown
    def look(name: str, base: str | None, k: float | None, eps: float) -> Any:
        if not base:
            raise InputError("Choose the base that the adapter was trained on.")
        report = apart(intruders.plain_report, name, base, int(k or 10))
        return [panel(report, eps), report]

    chosen.change(offer, [chosen, shelf], [spectrum.fold, spectrum.base, spectrum.told, spectrum.report], **PRIVATE)
    spectrum.ask.click(lambda: _WAIT, None, spectrum.told, **PRIVATE).then(
        look, [chosen, spectrum.base, spectrum.k, spectrum.eps], [spectrum.told, spectrum.report], **PRIVATE
    ).then(lambda told: "" if told == _WAIT else gr.skip(), spectrum.told, spectrum.told, **PRIVATE)
    spectrum.eps.change(
        lambda report, eps: panel(report, eps) if report else gr.skip(), [spectrum.report, spectrum.eps],
        spectrum.told, trigger_mode="always_last", **PRIVATE,
    )  # fmt: skip
    softening.wire(spectrum.softening, chosen, [spectrum.base, spectrum.k, spectrum.eps], spectrum.report)


def panel(report: Mapping[str, Any], eps: float) -> str:
    """A row of cells per layer, most intruders first: dark where the base has such a direction, framed where not."""
    most_first = sorted(report["layers"], key=lambda layer: -_count(layer, eps))
    rows = "".join(_row(layer, eps) for layer in most_first)
    heads = "".join(f"<th scope=col>{j}</th>" for j in range(int(report["k"])))
    new = sum(_count(layer, eps) for layer in report["layers"])
    change = max(layer["relative_change"] for layer in report["layers"])
    return (
        f'<section class="as-spectrum" aria-label="Intruder dimensions by layer"><p><b>{new} intruders</b> among the '
        f"{report['of']} largest directions of {len(report['layers'])} layers; the update is at most {change:.0%} of a "
        f'weight.</p><div tabindex=0><table><thead><tr><th scope=col>layer</th>{heads}<th scope=col aria-label="'
        f'intruders"></th></tr></thead><tbody>{rows}</tbody></table></div><p class="legend"><i style="--c:1"></i>as in '
        'the base<i style="--c:0.1"></i>unlike it<i class="new" style="--c:0.1"></i>intruder</p></section>'
    )


def _count(layer: Mapping[str, Any], eps: float) -> int:
    return sum(value < eps for value in layer["cosines"])


def _row(layer: Mapping[str, Any], eps: float) -> str:
    name = markup.text(layer["name"])
    cells = "".join(
        f'<td{" class=new" if value < eps else ""} style="--c:{value:.2f}" title="direction {j}: {value:.2f}"></td>'
        for j, value in enumerate(layer["cosines"])
    )
    count = _count(layer, eps)
    return f'<tr><th scope=row title="{name}"><span>{name}</span></th>{cells}<td class=count>{count or ""}</td></tr>'


_WAIT = '<p class="as-doctor-wait" role="status">Reading the weights of the base and the adapter…</p>'
