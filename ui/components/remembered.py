"""Forms that survive a reload: the browser keeps their values (and nothing else does)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

SECRET = "adapter-studio"
"""The browser's copy is readable only with it; a fixed one, so that forms also survive a new start of the studio."""


def remember(name: str, components: Sequence[Any]) -> gr.BrowserState:
    """Keep the values of ``components`` in the browser under ``name``, always as they are now."""
    kept = gr.BrowserState(None, storage_key=f"adapter-studio-{name}", secret=SECRET)
    own = f"(...values) => [values.slice(0, {len(components)})]"  # what was kept before comes behind them
    gr.on([component.change for component in components], None, list(components), kept, js=own,
          show_progress="hidden", api_visibility="private")  # fmt: skip
    return kept


def values(kept: Any, count: int) -> list[Any] | None:
    """What was kept, if it is of this form: ``count`` values. None for nothing, or for another version's form."""
    return kept if isinstance(kept, list) and len(kept) == count else None
