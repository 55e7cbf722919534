"""The Library page's view of a mixture of experts: which expert takes which tokens, router by router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio.inspection import experts
from studio.processes import apart
from ui import markup
from ui.components import rows_file
from ui.components.inspected import base_choice, chosen_adapter
from ui.errors import errors_shown
from ui.events import PRIVATE


@dataclass
class Loads:
    """The accordion and its inputs."""

    fold: gr.Accordion
    base: gr.Dropdown
    data: gr.File
    by: gr.Textbox
    ask: gr.Button
    told: gr.HTML


def draw() -> Loads:
    """Draw it inside the current column, hidden until a mixture is chosen."""
    with gr.Accordion("Which expert takes which tokens", open=False, visible=False, elem_classes="as-more",
                      elem_id="expert-loads") as fold:  # fmt: skip
        gr.HTML(
            "<p>Runs the mixture on rows and shows the load of every expert. Drop rows as for a training, or leave it "
            "empty for those that it was trained on.</p>", elem_classes="as-help", apply_default_css=False,
        )  # fmt: skip
        with gr.Row():
            base = gr.Dropdown([], label="Base it was trained on", allow_custom_value=True, interactive=True,
                               min_width=150, elem_id="loads-base")  # fmt: skip
            by = gr.Textbox(label="Column that groups the rows", placeholder="none: one group", max_lines=1,
                            min_width=150, elem_id="loads-by")  # fmt: skip
        data = gr.File(label="Rows", file_count="multiple", height=100, elem_id="loads-data",
                       file_types=rows_file.TYPES)  # fmt: skip
        ask = gr.Button("Look at its routers", size="md", elem_id="loads-ask")
        told = gr.HTML("", elem_id="loads-told", apply_default_css=False)
    return Loads(fold, base, data, by, ask, told)


def wire(loads: Loads, chosen: gr.State, shelf: gr.Radio) -> None:
    """Show it for a chosen mixture, and run it on request."""

    @errors_shown
    def offer(name: str, shown: str) -> Any:
        record = chosen_adapter(name, shown)
        if record is None or not experts.is_mixture(record.path):
            return [gr.update(visible=False), gr.skip(), ""]
        return [gr.update(visible=True), base_choice(record), ""]

    @errors_shown
    def look(name: str, base: str | None, data: Sequence[str] | None, by: str) -> str:
        return panel(apart(experts.experts, name, list(data or ()), base or "", (by or "").strip()).to_dict())

    chosen.change(offer, [chosen, shelf], [loads.fold, loads.base, loads.told], **PRIVATE)
    loads.ask.click(lambda: _WAIT, None, loads.told, **PRIVATE).then(
        look, [chosen, loads.base, loads.data, loads.by], loads.told, **PRIVATE
    ).then(lambda told: "" if told == _WAIT else gr.skip(), loads.told, loads.told, **PRIVATE)


def panel(report: Mapping[str, Any]) -> str:
    """A row per router: for each group a cell per expert, dark where it takes many tokens; then the experts' tokens."""
    routers, groups = report["routers"], report["groups"]
    widest = max(len(router["load"]) for router in routers)
    heads = "".join(
        f'<th scope=colgroup colspan={widest} class=group>{markup.text(group)} <small>{count}</small></th>'
        for group, count in groups.items()
    )
    rows = "".join(_row(router, list(groups), report["experts"], widest) for router in routers)
    most = max(routers, key=lambda router: router["busiest"])
    told = f"The busiest expert takes <b>{most['busiest']:.1f} times</b> an even share ({_name(most)})"
    if len(groups) > 1:
        apart = max(routers, key=lambda router: router["apart"])
        told += f"; groups are routed most differently in {_name(apart)} (<b>{apart['apart']:.0%}</b> of the tokens)"
    return (
        f'<section class="as-spectrum as-loads" aria-label="Load of the experts"><p>{told}.</p><div tabindex=0><table>'
        f"<thead><tr><th scope=col>router</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        '<p class="legend"><i style="--c:0"></i>no tokens<i style="--c:0.5"></i>an even share<i style="--c:1"></i>'
        f"twice that or more</p>{_words(report)}</section>"
    )


def _name(router: Mapping[str, Any]) -> str:
    return markup.text(router["module"] or "the whole model")


def _row(router: Mapping[str, Any], groups: Sequence[str], names: Sequence[str], widest: int) -> str:
    cells = []
    for group in groups:
        loads = router["groups"].get(group, ())
        for expert, load in enumerate(loads):
            depth = experts.depth(load, len(loads))
            title = markup.text(f"expert {names[expert]}: {load:.0%} of {group}")
            cells.append(f'<td style="--c:{depth:.2f}" title="{title}"></td>')
        cells.append(f"<td class=none colspan={widest - len(loads)}></td>" if len(loads) < widest else "")
    name = _name(router)
    facts = f"busiest {router['busiest']:.2f}, {router['unused']} unused, entropy {router['entropy']:.2f}"
    return f'<tr><th scope=row title="{name}: {facts}"><span>{name}</span></th>{"".join(cells)}</tr>'


def _words(report: Mapping[str, Any]) -> str:
    """Tokens that each expert of the last router takes more often than others do."""
    last = report["routers"][-1]
    pairs = [
        (f"Expert {name}", " ".join(f"“{word}”" for word in own) or "nothing of its own")
        for name, own in zip(report["experts"], last["words"], strict=False)
    ]
    return f"<p>Tokens of the experts in {_name(last)}:</p>{markup.facts(pairs)}"


_WAIT = '<p class="as-doctor-wait" role="status">Running the mixture on the rows…</p>'
