"""Gallery: every kept picture; filter, star, compare two, reuse settings, delete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio.composition import comparison, gallery, recipe_png
from studio.composition.gallery import Picture
from ui import markup
from ui.components import picture_list
from ui.components.pick_list import pick_list, picked
from ui.errors import errors_shown
from ui.events import PRIVATE
from ui.pages import compose


@dataclass
class Page:
    """What the app and other pages need."""

    chosen: gr.State
    reuse: gr.Button
    go_on: gr.Button
    refresh_inputs: list[Any]
    refresh_outputs: list[Any]


@dataclass
class _Filters:
    adapter: gr.Dropdown
    method: gr.Dropdown
    base: gr.Dropdown
    starred: gr.Checkbox

    @classmethod
    def draw(cls) -> _Filters:
        with gr.Row(elem_classes="as-filters"):
            adapter, method, base = (
                gr.Dropdown([("all", "")], value="", label=label, interactive=True, min_width=110, elem_id=f"of-{name}")
                for label, name in (("Adapter", "adapter"), ("Method", "method"), ("Base model", "base"))
            )
            starred = gr.Checkbox(False, label="Starred only", container=False, elem_id="of-starred", min_width=110)
        return cls(adapter, method, base, starred)

    @property
    def all(self) -> list[Any]:
        return [self.adapter, self.method, self.base, self.starred]


@dataclass
class _Detail:
    slider: gr.ImageSlider
    panel: gr.HTML
    actions: gr.Row
    reuse: gr.Button
    go_on: gr.Button
    star: gr.Button
    compare: gr.Button
    download: gr.DownloadButton
    delete: gr.Button

    @classmethod
    def draw(cls) -> _Detail:
        slider = gr.ImageSlider(label="Drag to compare", show_label=False, visible=False, interactive=False,
                                elem_id="gallery-slider", buttons=["fullscreen"])  # fmt: skip
        panel = gr.HTML("", elem_id="gallery-panel", apply_default_css=False)
        with gr.Row(visible=False, elem_classes="as-actions-row") as actions:
            reuse = gr.Button("Reuse these settings", variant="primary", size="md", elem_id="gallery-reuse")
            go_on = gr.Button("Use as start", size="md", elem_id="gallery-start")
            star = gr.Button("Star", size="md", elem_id="gallery-star")
            compare = gr.Button("Compare", size="md", elem_id="gallery-compare")
            download = gr.DownloadButton("Download", size="md")
            delete = gr.Button("Delete", variant="stop", size="md", elem_id="gallery-delete")
        return cls(slider, panel, actions, reuse, go_on, star, compare, download, delete)

    @property
    def view(self) -> list[Any]:
        return [self.slider, self.panel, self.actions, self.star, self.compare, self.download]


def build() -> Page:
    """Draw the page inside the current tab."""
    chosen, other, comparing = gr.State(""), gr.State(""), gr.State(False)
    with gr.Row(elem_classes="as-page"):
        with gr.Column(scale=6, min_width=320):
            filters = _Filters.draw()
            cells = pick_list(elem_id="gallery-list")
        with gr.Column(scale=6, min_width=320, elem_id="gallery-detail", elem_classes="as-side"):
            detail = _Detail.draw()
    inputs = [chosen, other, comparing, *filters.all]
    outputs = [chosen, other, comparing, *filters.all[:3], cells, *detail.view]
    page = Page(chosen, detail.reuse, detail.go_on, inputs, outputs)
    _wire(page, cells, filters, detail)
    return page


# ------------------------------------------------------------------------------------------------ what is shown


def show(chosen: str, other: str, comparing: bool, adapter: str, method: str, base: str, starred: bool) -> list[Any]:
    """The list and the details, as they are now."""
    kept = gallery.pictures()
    adapters, methods, bases = gallery.choices(kept)
    wanted = (_among(adapter, adapters), _among(method, methods), _among(base, bases))
    found = gallery.pictures(*wanted, starred) if any(wanted) or starred else kept
    one, two = _still(chosen), _still(other)
    first, second = (one.key if one else ""), (two.key if one and two else "")
    named = [(name, name) for name in adapters], [(comparison.title(n), n) for n in methods], [(n, n) for n in bases]
    filters = [
        gr.update(choices=[("all", ""), *names], value=value) for names, value in zip(named, wanted, strict=True)
    ]
    cells = picture_list.grid(found, first, second) if found else _nothing(bool(kept))
    return [first, second, comparing and bool(one), *filters, cells, *_detail(one, two, comparing)]


def _among(value: str | None, names: list[str]) -> str:
    return value if value in names else ""


def _still(key: str) -> Picture | None:
    try:
        return gallery.find(key) if key else None
    except InputError:
        return None


def _nothing(filtered: bool) -> str:
    if filtered:
        return markup.empty("No picture matches", "Remove a filter.")
    return markup.empty("No pictures yet", "What you make on Compose is kept here, with its settings.")


def _detail(one: Picture | None, two: Picture | None, comparing: bool) -> list[Any]:
    if one is None:
        hint = markup.empty("Choose a picture", "Its settings show here.")
        return [gr.update(visible=False), hint, gr.update(visible=False), *[gr.skip()] * 3]
    slider = gr.update(visible=bool(two), value=(str(one.path), str(two.path)) if two else None)
    word = "Stop comparing" if comparing else "Compare"
    star = "Unstar" if one.starred else "Star"
    return [slider, _panel(one, two, comparing), gr.update(visible=True), gr.update(value=star), gr.update(value=word),
            gr.update(value=str(one.video or one.path))]  # fmt: skip


def _panel(one: Picture, two: Picture | None, comparing: bool) -> str:
    if two is not None:
        sides = "".join(
            f"<div><h3>{side}</h3>{compose.recipe_panel(recipe_png.read_recipe(picture.path))}</div>"
            for side, picture in (("Left", one), ("Right", two))
        )
        return f'<div class="as-two">{sides}</div>'
    hint = markup.notice("Now choose the picture to compare it with.", "info") if comparing else ""
    picture = markup.shown(one.path, one.video, one.prompt, "as-large")
    return f"{hint}{picture}{compose.recipe_panel(recipe_png.read_recipe(one.path))}"


# ------------------------------------------------------------------------------------------------ what happens


def _wire(page: Page, cells: gr.HTML, filters: _Filters, detail: _Detail) -> None:
    @errors_shown
    def choose(chosen: str, _other: str, comparing: bool, *asked: Any, event: gr.EventData) -> Any:
        key = picked(event)
        if comparing and chosen and key != chosen:
            return show(chosen, key, True, *asked)
        return show(key, "", False, *asked)

    @errors_shown
    def star(chosen: str, *rest: Any) -> Any:
        gallery.star(chosen, not gallery.find(chosen).starred)
        return show(chosen, *rest)

    @errors_shown
    def compare(chosen: str, _other: str, comparing: bool, *asked: Any) -> Any:
        return show(chosen, "", not comparing, *asked)

    @errors_shown
    def delete(chosen: str, *rest: Any) -> Any:
        if not chosen:
            return gr.skip()
        gallery.delete(chosen)
        return show("", *rest)

    def chosen_in(event: gr.EventData, *given: Any) -> Any:
        return choose(*given, event=event)

    cells.select(chosen_in, page.refresh_inputs, page.refresh_outputs, **PRIVATE)
    cells.select(None, None, None, js=_TO_DETAIL)
    for filtered in filters.all:
        filtered.input(errors_shown(show), page.refresh_inputs, page.refresh_outputs, **PRIVATE)
    detail.star.click(star, page.refresh_inputs, page.refresh_outputs, **PRIVATE)
    detail.compare.click(compare, page.refresh_inputs, page.refresh_outputs, **PRIVATE)
    detail.delete.click(delete, page.refresh_inputs, page.refresh_outputs, js=_SURE, **PRIVATE)


_TO_DETAIL = """() => { if (window.innerWidth < 760)
  document.getElementById('gallery-detail')?.scrollIntoView({behavior: 'smooth', block: 'start'}); }"""

_SURE = """(chosen, ...rest) =>
  [window.confirm('Delete this picture for good?') ? chosen : '', ...rest]"""
