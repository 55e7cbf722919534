"""Thumbnails in menus of adapters.

Gradio's dropdown shows text only. Every option carries its text as ``aria-label``, by which a style sheet gives it a
picture; the menu itself (search, keyboard) stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import gradio as gr

from studio.library import Record
from ui import markup

MENU = "as-faces"
"""Class of the menus whose options have pictures."""


def draw(choices: Iterable[tuple[str, Record]]) -> gr.HTML:
    """The style sheet as an invisible part of the page."""
    return gr.HTML(sheet(choices), elem_classes="as-sheet", apply_default_css=False, padding=False)


def sheet(choices: Iterable[tuple[str, Record]]) -> str:
    """A rule for every option (its text, its record) that has a preview; important, as Gradio narrows the app's own."""
    rules = [
        f'.{MENU} [role=option][aria-label="{_quoted(label)}"]::before{{background-image:url("{address}") !important}}'
        for label, record in choices
        if (address := markup.file_url(record.preview, record.modified))
    ]
    return f"<style>{''.join(rules)}</style>" if rules else ""


def _quoted(label: str) -> str:
    """``label`` inside a string of a style sheet, where it cannot end the string or the sheet."""
    return re.sub(r"[^\w .-]", lambda found: f"\\{ord(found[0]):x} ", label, flags=re.ASCII)
