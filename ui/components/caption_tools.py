"""Edit the captions of all dropped pictures: one for all, find and replace, tags with counts, or by a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio.datasets import caption_edits as edits
from ui import markup, pictures
from ui.errors import errors_shown
from ui.events import PRIVATE
from ui.pictures import Item

SHOWN = 40


def draw(captions: gr.HTML) -> None:
    """Draw the tools inside the current card; ``captions`` holds the pictures (a list of :data:`Item`)."""
    with gr.Accordion("Captions of all pictures", open=False, elem_classes="as-more", elem_id="caption-tools"):
        tags = gr.HTML(tag_list([]), apply_default_css=False, elem_id="caption-tags")
        captions.change(tag_list, captions, tags, **PRIVATE)
        text = gr.Textbox(label="One caption for all", elem_id="caption-all")
        missing = gr.Checkbox(label="Only where there is none", elem_id="caption-missing")
        _button("Set captions", same_for_all, captions, [text, missing])
        with gr.Row():
            find = gr.Textbox(label="Find", min_width=120, elem_id="caption-find")
            put = gr.Textbox(label="Replace with", min_width=120, elem_id="caption-replace")
        words = gr.Checkbox(label="Whole words only", value=True, elem_id="caption-words")
        _button("Replace", replaced, captions, [find, put, words])
        with gr.Row():
            add = gr.Textbox(label="Tags to add", placeholder="red, small", min_width=120, elem_id="caption-add")
            remove = gr.Textbox(label="Tags to remove", min_width=120, elem_id="caption-remove")
        _button("Change tags", change_tags, captions, [add, remove])
        model = gr.Textbox(
            label="Folder of an image-to-text model", elem_id="caption-model",
            info="A Transformers model (BLIP, GIT, Qwen-VL ...) on this computer; nothing is downloaded.",
        )  # fmt: skip
        prompt = gr.Textbox(label="Prompt for the model, or how its captions begin (optional)")
        _button("Write captions", by_model, captions, [model, prompt, missing], show_progress="full")


def _button(label: str, change: Callable[..., Any], captions: gr.HTML, inputs: list[Any], **options: Any) -> None:
    gr.Button(label, size="sm").click(errors_shown(change), [captions, *inputs], captions, **{**PRIVATE, **options})


def same_for_all(items: list[Item], text: str, only_missing: bool) -> list[Item]:
    """The items with one caption."""
    return _with(items, edits.same_for_all(_captions(items), text, only_missing))


def replaced(items: list[Item], find: str, put: str, whole_words: bool) -> list[Item]:
    """The items with ``find`` replaced in every caption."""
    return _with(items, edits.replaced(_captions(items), find, put, whole_words))


def change_tags(items: list[Item], add: str, remove: str) -> list[Item]:
    """The items with tags added to and removed from every caption."""
    captions = edits.with_tags(_captions(items), edits.tags_of(add))
    return _with(items, edits.without_tags(captions, edits.tags_of(remove)))


def by_model(items: list[Item], folder: str, prompt: str, only_missing: bool) -> list[Item]:
    """The items with captions from the model in ``folder``."""
    from studio.datasets.captioner import Captioner

    wanted = [item for item in items if not (only_missing and item["caption"])]
    if not wanted:
        raise InputError("No picture needs a caption: drop some first.")
    files = [pictures.uploaded(item["id"]) for item in wanted]
    written = Captioner(folder.strip(), prompt.strip()).captions(files)
    return _with(items, {item["id"]: text for item, text in zip(wanted, written, strict=True)})


def tag_list(items: list[Item]) -> str:
    """The most frequent tags and how many captions have them, as HTML."""
    counts = edits.tag_counts(_captions(items or []))
    if not counts:
        return ""
    more = f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""
    shown = ", ".join(f"{markup.text(tag)} ({count})" for tag, count in counts[:SHOWN])
    return f'<p class="as-help">Tags: {shown}{more}</p>'


def _captions(items: list[Item]) -> edits.Captions:
    return {item["id"]: str(item.get("caption") or "") for item in items}


def _with(items: list[Item], captions: edits.Captions) -> list[Item]:
    return [{**item, "caption": captions.get(item["id"], item.get("caption", ""))} for item in items]
