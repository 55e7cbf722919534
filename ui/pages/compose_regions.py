"""Where adapters act on the Compose page: everywhere, in drawn regions, or in regions found automatically."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio import catalogue, library
from studio.composition import canvas_size, methods
from studio.composition.region_schema import DEFAULT_METHOD, RegionFields
from studio.composition.schema import ComposeConfig
from studio.jobs import Job
from ui import markup
from ui.components import canvas, rack, schema_form, start
from ui.components.schema_form import Field
from ui.errors import errors_shown
from ui.events import PRIVATE

KNOWN = schema_form.fields(RegionFields)
OPTIONS = tuple(name for name in KNOWN if name != "regions")
"""Options for regions, in the order of the form."""

EVERYWHERE, DRAWN, AUTO = "everywhere", "drawn", "auto"
MODES = [("Everywhere", EVERYWHERE), ("In regions I draw", DRAWN), ("Found automatically", AUTO)]
HELP = {
    EVERYWHERE: "Every adapter acts on the whole picture.",
    DRAWN: "Each region has its own adapters and prompt. Keep the seed to see what moving a region changes.",
    AUTO: "Every adapter gets the place where the first steps draw its subject.",
}
SWITCH = [("as the method says", ""), ("on", "on"), ("off", "off")]



@dataclass
class Where:
    """The card."""

    mode: gr.Radio
    help: gr.HTML
    canvas: gr.HTML
    more: gr.Accordion
    options: dict[str, Any]

    @property
    def inputs(self) -> list[Any]:
        """What :func:`read` takes."""
        return [self.mode, self.canvas, *self.options.values()]

    @property
    def outputs(self) -> list[Any]:
        """What :func:`fill` and :func:`switch` give."""
        return [self.mode, self.help, self.canvas, self.more]


def draw() -> Where:
    """Draw the card inside the current group."""
    mode = gr.Radio(MODES, value=EVERYWHERE, label="Where adapters act", elem_classes="as-choices", elem_id="where")
    told = gr.HTML(_told(EVERYWHERE), elem_classes="as-help", apply_default_css=False)
    frame = canvas.canvas(visible="hidden")
    with gr.Accordion("How regions are used", open=False, visible=False, elem_classes="as-more as-inside") as more:
        options = {name: _widget(KNOWN[name]) for name in OPTIONS}
    return Where(mode, told, frame, more, options)


def read(mode: str, drawn: Sequence[Mapping[str, Any]] | None, *options: Any) -> dict[str, Any]:
    """The fields of a composition; raises :class:`InputError` for unfinished regions."""
    if mode not in (DRAWN, AUTO):
        return {}
    values = {name: _read(KNOWN[name], value) for name, value in zip(OPTIONS, options, strict=True)}
    return {"regions": "auto" if mode == AUTO else canvas.read(drawn), **values}


def fill(config: Mapping[str, Any], names: Mapping[str, str]) -> list[Any]:
    """Updates of :attr:`Where.outputs` and the options from a recipe's configuration, with its picture's frame."""
    regions = config.get("regions") or []
    mode = AUTO if regions == "auto" else DRAWN if regions else EVERYWHERE
    shown = canvas.show(regions if mode == DRAWN else [], names)
    frame = canvas_size.size(str(config.get("base")), config.get("width"), config.get("height"))
    options = [_show(KNOWN[name], config.get(name, KNOWN[name].default)) for name in OPTIONS]
    told, where, more = switch(mode)
    return [mode, told, {**where, "value": shown, "frame": list(frame)}, more, *options]


def switch(mode: str) -> list[Any]:
    """Updates of help, canvas and options for a mode."""
    drawn = mode in (DRAWN, AUTO)
    visible: Any = True if drawn else "hidden"
    return [_told(mode), gr.update(visible=visible, mode=AUTO if mode == AUTO else DRAWN), gr.update(visible=drawn)]


def offered(mode: str) -> list[tuple[str, str]]:
    """The methods for a mode as choices: those with regions, or those without."""
    regional = mode in (DRAWN, AUTO)
    found = {method.name: method for method in catalogue.stage("compose")}
    chosen = [found[name] for name in methods.names(lambda known: known.regional == regional)]
    return [(method.title or method.name, method.name) for method in chosen]


def suitable(mode: str, method: str) -> str:
    """``method`` if the mode has it, else the mode's default."""
    names = [name for _, name in offered(mode)]
    usual = DEFAULT_METHOD if mode in (DRAWN, AUTO) else str(ComposeConfig.model_fields["method"].default)
    return method if method in names else usual


def frame_of(base: str, width: int | None, height: int | None, begun: Mapping[str, Any] | None) -> tuple[int, int]:
    """Width and height of the picture that will be made; it follows the start picture."""
    picture = start.size(begun)
    return canvas_size.following(picture, base, width, height) if picture else canvas_size.size(base, width, height)


def wire(where: Where, form: Mapping[str, Any], begun: gr.HTML) -> None:
    """Let the frame follow the size of the picture, which follows the start picture."""

    @errors_shown
    def reshape(base: str, width: Any, height: Any, begun: Mapping[str, Any] | None) -> Any:
        known = schema_form.fields(ComposeConfig)
        sides = [schema_form.read(known[name], value) for name, value in (("width", width), ("height", height))]
        return gr.update(frame=list(frame_of(base, sides[0], sides[1], begun)))

    @errors_shown
    def widen(base: str, width: Any, height: Any, begun: Mapping[str, Any] | None, event: gr.EventData) -> Any:
        size = wide(int(getattr(event, "count", 2)), base, width, height, begun)
        return [*size, gr.update(frame=list(size))] if size else gr.skip()

    shape = [*(form[name] for name in ("base", "width", "height")), begun]
    where.canvas.side_by_side(widen, shape, [*shape[1:3], where.canvas], **PRIVATE)
    form["base"].change(reshape, shape, where.canvas, **PRIVATE)
    begun.change(reshape, shape, where.canvas, **PRIVATE)
    for side in shape[1:3]:
        side.blur(reshape, shape, where.canvas, **PRIVATE)
        side.submit(reshape, shape, where.canvas, **PRIVATE)


def wide(
    columns: int, base: str, width: Any, height: Any, begun: Mapping[str, Any] | None = None
) -> tuple[int, int] | None:
    """Width and height for regions side by side; None if the user or the start picture has set a size."""
    return None if width or height or begun else canvas_size.wide(base, columns)


def result(job: Job | None, picture: str) -> Any:
    """Update the canvas: a picture behind its regions, and places that were found automatically."""
    places = job.result.get("regions") if job and job.result and _first(job, picture) else []
    if isinstance(places, dict):
        places = places.get(Path(picture).parent.name, [])
    auto = bool(job) and job is not None and job.config.get("regions") == "auto"
    found = [
        {"name": str(place["name"]), "mask": markup.file_url(place["mask"])}
        for place in places or ()
        if auto and place.get("mask")
    ]
    return gr.update(picture=markup.file_url(picture) if picture else "", found=found)


def mini(config: Mapping[str, Any]) -> str:
    """The regions of a recipe as a small drawing with a list."""
    regions = config.get("regions") or []
    if regions == "auto":
        return '<p class="as-places-auto">Each adapter at the place found for it</p>'
    names = [str(use.get("name")) for use in config.get("adapters") or ()]
    shapes, rows = "", ""
    for number, region in enumerate(regions, 1):
        first = next((names.index(name) for name in region.get("adapters", ()) if name in names), 0)
        tone = f"tone-{'abcdef'[first % 6]}"
        if region.get("box"):
            x0, y0, x1, y1 = (100 * edge for edge in region["box"])
            shapes += f'<rect class="{tone}" x="{x0:g}" y="{y0:g}" width="{x1 - x0:g}" height="{y1 - y0:g}" rx="3"/>'
        what = region.get("name") or " + ".join(region.get("adapters", ()))
        more = [f"“{markup.text(region['prompt'])}”"] if region.get("prompt") else []
        more += [] if region.get("scale", 1) == 1 else [f"× {region['scale']:g}"]
        more += [] if region.get("box") else ["painted"]
        rows += f'<li class="{tone}"><b>{number}</b> {markup.text(what)} <span>{", ".join(more)}</span></li>'
    if not rows:
        return ""
    width, height = canvas_size.size(str(config.get("base")), config.get("width"), config.get("height"))
    drawing = (
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" style="aspect-ratio:{width} / {height}" '
        f'aria-hidden="true">{shapes}</svg>'
    )
    return f'<div class="as-places">{drawing}<ol>{rows}</ol></div>'


def names_here(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Name in a recipe -> name in the library."""
    hashes = {str(entry.get("name")): str(entry.get("sha256")) for entry in recipe.get("adapters") or ()}
    return rack.renamed(recipe["config"], library.adapters(), hashes)


def _first(job: Job, picture: str) -> bool:
    made = (job.result or {}).get("images") or []
    return bool(made) and (job.kind == "compare" or picture == str(made[0]))


def _told(mode: str) -> str:
    return f"<p>{markup.text(HELP.get(mode, ''))}</p>"


def _widget(item: Field) -> gr.components.Component:
    """The widget of an option; if it may be left to the method, a choice of three."""
    if item.kind == "flag" and item.optional:
        return gr.Dropdown(SWITCH, value="", label=item.label, info=item.help, interactive=True)
    if item.kind == "choice" and item.optional:
        choices = [("as the method says", ""), *((name, name) for name in item.choices)]
        return gr.Dropdown(choices, value="", label=item.label, info=item.help, interactive=True)
    return schema_form.widget(item)


def _read(item: Field, value: Any) -> Any:
    if item.kind == "flag" and item.optional:
        return {"on": True, "off": False}.get(value)
    return schema_form.read(item, value)


def _show(item: Field, value: Any) -> Any:
    if item.kind == "flag" and item.optional:
        return "" if value is None else "on" if value else "off"
    if item.kind == "choice" and item.optional:
        return value or ""
    return schema_form.show(item, value)


def check(mode: str, rows: Sequence[Mapping[str, Any]] | None) -> None:
    """Raise :class:`InputError` when regions are asked for without adapters to put in them."""
    if mode in (DRAWN, AUTO) and not rows:
        raise InputError("Regions need adapters: choose at least one above, or let the base model draw everywhere.")
