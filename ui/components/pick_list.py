"""HTML with pickable parts: a click on anything with ``data-pick="..."`` fires one event."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.theme import script


def pick_list(value: str = "", **options: Any) -> gr.HTML:
    """An HTML component; its ``select`` event carries what was picked (see :func:`picked`)."""
    return gr.HTML(value, js_on_load=script("pick_list"), apply_default_css=False, **options)


def picked(event: gr.EventData) -> str:
    """What was picked."""
    return str(getattr(event, "picked", "") or "")
