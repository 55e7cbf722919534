"""What the Library page's views of a chosen adapter have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from studio import library
from studio.library import Record


def chosen_adapter(name: str, shelf: str) -> Record | None:
    """The adapter that is chosen on the Library page; None for a broken one, and on the shelf of the bases."""
    record = next((one for one in library.adapters() if one.name == name), None) if shelf == "adapter" else None
    return None if record is None or record.problem else record


def base_choice(record: Record, fits: Callable[[Record], bool] = lambda base: True) -> Any:
    """Fill a dropdown with the bases that fit, at first the one that the adapter names."""
    bases = [one.name for one in library.bases() if not one.problem and fits(one)]
    return gr.update(choices=bases, value=str(record.notes.get("base_model") or "") or None)
