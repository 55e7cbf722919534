"""Library: the adapters and base models the studio knows, and the trash."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gradio as gr

from adapters.errors import InputError
from studio import jobs, library
from studio.library import Record, Trashed, base_families
from studio.printable import without_bytes
from ui import markup
from ui.components import auditing, expert_loads, rack, spectrum
from ui.components.pick_list import pick_list, picked
from ui.errors import errors_shown
from ui.events import PRIVATE

Shelf = Literal["adapter", "base", "trash"]
SHELVES = [("Adapters", "adapter"), ("Base models", "base"), ("Trash", "trash")]


@dataclass
class Page:
    """What the app and other pages need."""

    refresh_inputs: list[Any]
    refresh_outputs: list[Any]
    chosen: gr.State
    shelf: gr.Radio
    use: gr.Button
    looking: list[Any]
    """Components that :func:`open_job` fills."""
    acts: list[Any]
    """Events by which the user chooses or changes something."""


def build() -> Page:
    """Draw the page inside the current tab."""
    chosen = gr.State("")
    with gr.Row(elem_classes="as-page"):
        with gr.Column(scale=7, min_width=320):
            with gr.Row(elem_classes="as-toolbar"):
                shelf = gr.Radio(SHELVES, value="adapter", show_label=False, label="Shelf", elem_classes="as-choices",
                                 elem_id="shelf", container=False)  # fmt: skip
                search = gr.Textbox(label="Search", show_label=False, placeholder="Search name, family or trigger",
                                    elem_id="library-search", container=False, max_lines=1)  # fmt: skip
            cards = pick_list(elem_id="library-cards")
            importing = _Import.draw()
        with gr.Column(scale=5, min_width=320, elem_id="library-detail", elem_classes="as-side"):
            detail = _Detail.draw()
    shown = [cards, chosen, *detail.view]
    page = Page([shelf, search, chosen], shown, chosen, shelf, detail.use, [shelf, detail.spectrum.fold, *shown], [])
    page.acts += [cards.select, shelf.input, search.input, importing.button.click, detail.rename.click]
    spectrum.wire(detail.spectrum, chosen, shelf)
    expert_loads.wire(detail.loads, chosen, shelf)
    auditing.wire(detail.auditing, chosen, shelf)
    page.acts += [detail.trash.click, detail.restore.click, detail.empty_for_good.click]
    _wire_choosing(page, search, cards)
    _wire_import(page, importing)
    _wire_changes(page, detail)
    return page


@dataclass
class _Import:
    upload: gr.File
    place: gr.Textbox
    name: gr.Textbox
    button: gr.Button

    @classmethod
    def draw(cls) -> _Import:
        with gr.Accordion("Import", open=False, elem_classes="as-more", elem_id="library-import"):
            upload = gr.File(label="Drop a .safetensors adapter", file_types=[".safetensors"], height=110,
                             elem_id="import-file")  # fmt: skip
            place = gr.Textbox(
                label="Or from the Hugging Face Hub or this computer",
                placeholder="owner/repository or /path/to/file.safetensors",
                max_lines=1, elem_id="import-place",
            )  # fmt: skip
            name = gr.Textbox(label="Name in the library", placeholder="its own name", max_lines=1)
            button = gr.Button("Import", variant="primary", size="md", elem_id="import-button")
        return cls(upload, place, name, button)


@dataclass
class _Detail:
    panel: gr.HTML
    use: gr.Button
    actions: gr.Row
    download: gr.DownloadButton
    spectrum: spectrum.Spectrum
    loads: expert_loads.Loads
    auditing: auditing.Auditing
    changes: gr.Accordion
    new_name: gr.Textbox
    rename: gr.Button
    trash: gr.Button
    restore: gr.Button
    empty: gr.Accordion
    empty_for_good: gr.Button

    @classmethod
    def draw(cls) -> _Detail:
        panel = gr.HTML("", elem_id="library-panel", apply_default_css=False)
        with gr.Row(visible=False, elem_classes="as-actions-row") as actions:
            use = gr.Button("Use in Compose", variant="primary", size="md", elem_id="use-in-compose")
            download = gr.DownloadButton("Download", size="md", visible=False)
        layers = spectrum.draw()
        loads = expert_loads.draw()
        audit = auditing.draw()
        with gr.Accordion("Rename or remove", open=False, visible=False, elem_classes="as-more") as changes:
            new_name = gr.Textbox(label="New name", max_lines=1, elem_id="new-name")
            with gr.Row():
                rename = gr.Button("Rename", size="md", elem_id="rename")
                trash = gr.Button("Move to trash", variant="stop", size="md", elem_id="to-trash")
        restore = gr.Button("Restore", variant="primary", size="md", visible=False, elem_id="restore")
        with gr.Accordion("Empty the trash", open=False, visible=False, elem_classes="as-more") as empty:
            gr.Markdown("Everything in the trash is deleted from the disk and cannot be brought back.")
            empty_for_good = gr.Button("Delete permanently", variant="stop", size="md", elem_id="empty-trash")
        return cls(
            panel, use, actions, download, layers, loads, audit, changes, new_name, rename, trash, restore,
            empty, empty_for_good,
        )  # fmt: skip

    @property
    def view(self) -> list[Any]:
        return [self.panel, self.actions, self.download, self.changes, self.new_name, self.restore, self.empty]


# ------------------------------------------------------------------------------------------------ what is shown


def show(shelf: Shelf, search: str, chosen: str) -> list[Any]:
    """The cards and the details: values of a :class:`Page`'s ``refresh_outputs``."""
    if shelf == "trash":
        return _show_trash(search, chosen)
    records = [record for record in _records(shelf) if matches(record, search)]
    record = next((record for record in records if record.name == chosen), None)
    cards = "".join(card(item, item.name == chosen) for item in records)
    return [_shelf(cards, _nothing(shelf, search)), record.name if record else "", *_detail(record)]


def open_job(job_id: str, shown: tuple[Any, ...]) -> list[Any]:
    """The adapter of a forgetting job: values of a :class:`Page`'s ``looking``."""
    return ["adapter", gr.update(open=True), *show("adapter", "", str(jobs.get(job_id).config["adapter"]))]


def _records(shelf: Shelf) -> list[Record]:
    return library.adapters() if shelf == "adapter" else library.bases()


def matches(record: Record, search: str) -> bool:
    """Whether every word of ``search`` is on the card."""
    text = " ".join([record.name, record.family, *record.triggers, str(record.notes.get("description", ""))]).lower()
    return all(word in text for word in (search or "").lower().split())


def card(record: Record, chosen: bool) -> str:
    """One adapter or base as a card."""
    facts = " · ".join(filter(None, [rack.short_facts(record), markup.file_size(record.size)]))
    words = "".join(markup.tag(word) for word in record.triggers[:3])
    problem = markup.tag("cannot be used", "bad") if record.problem else ""
    shipped = markup.tag("shipped", "soft") if record.read_only else ""
    tags = problem + words + shipped + auditing.verdict_tag(record)
    return _card(record.name, record.name, facts, tags, _portrait(record), chosen)


def _card(key: str, name: str, facts: str, tags: str, portrait: str, chosen: bool) -> str:
    return (
        f'<button type="button" class="as-card-item{" chosen" if chosen else ""}" data-pick="{markup.text(key)}" '
        f'aria-pressed="{str(chosen).lower()}">{portrait}<span class="body"><strong>{markup.text(name)}</strong>'
        f"<small>{markup.text(facts)}</small><span>{tags}</span></span></button>"
    )


def _portrait(record: Record, kind: str = "face") -> str:
    if record.preview:
        url = markup.text(markup.file_url(record.preview, record.modified))
        return f'<img class="{kind}" alt="" loading="lazy" src="{url}">'
    return _initial(record.name, kind)


def _initial(name: str, kind: str) -> str:
    return f'<span class="{kind} none" aria-hidden="true">{markup.text(name[:1].upper())}</span>'


def _shelf(cards: str, nothing: str) -> str:
    return f'<div class="as-shelf">{cards}</div>' if cards else nothing


def _nothing(shelf: Shelf, search: str) -> str:
    if search:
        return markup.empty("Nothing matches", "Try fewer or other words.")
    if shelf == "adapter":
        return markup.empty("No adapters yet", "Import one below, or train your own on the Train page.")
    return markup.empty("No base models yet", "Import a diffusers folder, a .safetensors file or a hub id below.")


def _detail(record: Record | None) -> list[Any]:
    if record is None:
        hint = markup.empty("Choose something", "Its facts, trigger words and recipe show here.")
        return [hint, *(gr.update(visible=False) for _ in range(3)), "", *(gr.update(visible=False) for _ in range(2))]
    usable = not record.problem
    file = record.path if record.path.is_file() and record.kind == "adapter" else None
    download = gr.update(visible=file is not None, value=str(file) if file else None)
    changes = gr.update(visible=not record.read_only)
    trash_only = [gr.update(visible=False) for _ in range(2)]
    return [describe(record), gr.update(visible=usable), download, changes, record.name, *trash_only]


def describe(record: Record) -> str:
    """Everything about one adapter or base."""
    notes = record.notes
    words = "".join(markup.tag(word) for word in record.triggers)
    pairs = [
        ("Family", base_families.written(record.family)), ("Format", record.format), ("Rank", record.rank),
        ("Layers", notes.get("layers")), ("Size", markup.file_size(record.size)), ("Algorithm", notes.get("algorithm")),
        ("Base model", notes.get("base_model")), ("Licence", notes.get("license")), *base_use(record),
        ("Targets", _shortened(record.targets)), ("SHA-256", record.sha256), ("Where", without_bytes(str(record.path))),
    ]  # fmt: skip
    parts = [
        _portrait(record, "hero"), f"<h2>{markup.text(record.name)}</h2>",
        markup.notice(f"It cannot be used: {record.problem}.") if record.problem else "",
        f"<p>{markup.text(notes['description'])}</p>" if notes.get("description") else "",
        f'<p class="words"><span>Trigger words</span>{words}</p>' if words else "",
        markup.facts(pairs), _recipe(record),
    ]  # fmt: skip
    return f'<article class="as-detail">{"".join(parts)}</article>'


def base_use(record: Record) -> list[tuple[str, str]]:
    """What a base works with, and its family's licence if it names none; nothing for adapters."""
    if record.kind != "base":
        return []
    own = record.notes.get("license")
    family = "" if own else base_families.licence(record.family)
    return [("Works with", ", ".join(base_families.works_with(record.family))), ("Licence of the family", family)]


def _shortened(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _recipe(record: Record) -> str:
    if not record.recipe:
        return ""
    text = json.dumps(record.recipe, indent=2, ensure_ascii=False)
    return f"<details><summary>Recipe</summary><pre tabindex=0>{markup.text(text)}</pre></details>"


def _show_trash(search: str, chosen: str) -> list[Any]:
    items = [item for item in library.trashed() if (search or "").lower() in item.name.lower()]
    item = next((item for item in items if item.id == chosen), None)
    cards = "".join(_trash_card(entry, entry.id == chosen) for entry in items)
    empty = markup.empty("The trash is empty", "What you remove from the library waits here and can be restored.")
    panel = _trash_panel(item) if item else markup.empty("Choose something", "It can be restored to where it was.")
    hidden = [gr.update(visible=False) for _ in range(3)]
    below = [gr.update(visible=item is not None), gr.update(visible=bool(items))]
    return [_shelf(cards, empty), item.id if item else "", panel, *hidden, "", *below]


def _trash_card(item: Trashed, chosen: bool) -> str:
    facts = f"{item.kind} · removed {markup.ago(item.deleted)}"
    return _card(item.id, item.name, facts, "", _initial(item.name, "face"), chosen)


def _trash_panel(item: Trashed) -> str:
    pairs = [("Was", item.original), ("Removed", markup.ago(item.deleted))]
    return f'<article class="as-detail"><h2>{markup.text(item.name)}</h2>{markup.facts(pairs)}</article>'


# ------------------------------------------------------------------------------------------------ what happens



def _wire_choosing(page: Page, search: gr.Textbox, cards: gr.HTML) -> None:
    @errors_shown
    def choose(shelf: Shelf, words: str, event: gr.EventData) -> Any:
        name = picked(event)
        if shelf != "trash":
            library.show(name, shelf)  # reads the hash once
        return show(shelf, words, name)

    cards.select(choose, [page.shelf, search], page.refresh_outputs, **PRIVATE)
    cards.select(None, None, None, js=_TO_DETAIL)
    for change in (page.shelf.input, search.change):
        change(errors_shown(show), page.refresh_inputs, page.refresh_outputs, trigger_mode="always_last", **PRIVATE)


_TO_DETAIL = """() => { if (window.innerWidth < 760)
  document.getElementById('library-detail')?.scrollIntoView({behavior: 'smooth', block: 'start'}); }"""


def _wire_import(page: Page, importing: _Import) -> None:
    @errors_shown
    def bring(upload: str | None, place: str, name: str, shelf: Shelf) -> Any:
        source = upload or place.strip()
        if not source:
            raise InputError("Drop a file, or write a hub id, to import.")
        bring_in = library.import_base if shelf == "base" and not upload else library.import_adapter
        record = bring_in(source, name.strip() or None)
        gr.Info(f"'{markup.text(record.name)}' is in the library.", title="Imported")
        shelf = record.kind
        return [None, "", "", shelf, *show(shelf, "", record.name)]

    importing.button.click(
        bring, [importing.upload, importing.place, importing.name, page.shelf],
        [importing.upload, importing.place, importing.name, page.shelf, *page.refresh_outputs],
        show_progress="minimal", show_progress_on=importing.button, api_visibility="private",
    )  # fmt: skip


def _wire_changes(page: Page, detail: _Detail) -> None:
    @errors_shown
    def rename(chosen: str, new_name: str, shelf: Shelf, words: str) -> Any:
        record = library.rename(chosen, new_name.strip(), "base" if shelf == "base" else "adapter")
        return show(shelf, words, record.name)

    @errors_shown
    def trash(chosen: str, shelf: Shelf, words: str) -> Any:
        library.trash(chosen, "base" if shelf == "base" else "adapter")
        gr.Info("It is in the trash and can be restored.", title="Removed")
        return show(shelf, words, "")

    @errors_shown
    def restore(chosen: str, words: str) -> Any:
        record = library.restore(chosen)
        return [record.kind, *show(record.kind, words, record.name)]

    @errors_shown
    def delete_for_good(words: str) -> Any:
        number = library.empty_trash()
        gr.Info(f"{number} item{'s' if number != 1 else ''} deleted permanently.", title="Trash emptied")
        return show("trash", words, "")

    shelf, search = page.refresh_inputs[0], page.refresh_inputs[1]
    detail.empty_for_good.click(delete_for_good, [search], page.refresh_outputs, **PRIVATE)
    detail.rename.click(rename, [page.chosen, detail.new_name, shelf, search], page.refresh_outputs, **PRIVATE)
    detail.trash.click(trash, [page.chosen, shelf, search], page.refresh_outputs, **PRIVATE)
    detail.restore.click(restore, [page.chosen, search], [shelf, *page.refresh_outputs], **PRIVATE)
