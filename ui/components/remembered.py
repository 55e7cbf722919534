"""Forms that survive a reload: only the browser keeps their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ui.events import PRIVATE

SECRET = "adapter-studio"
"""Key of the browser's copy; fixed, so that forms also survive a restart of the studio."""


def remember(name: str, components: Sequence[Any]) -> gr.BrowserState:
    """Keep the current values of ``components`` in the browser under ``name``."""
    kept = gr.BrowserState(None, storage_key=f"adapter-studio-{name}", secret=SECRET)
    own = f"(...values) => [values.slice(0, {len(components)})]"  # the earlier copy follows them
    gr.on([component.change for component in components], None, list(components), kept, js=own,
          **PRIVATE)  # fmt: skip
    return kept


def remember_job(name: str, job: gr.State) -> gr.BrowserState:
    """Keep the id of the job that a page shows, so that a reload of this browser comes back to it."""
    kept = gr.BrowserState("", storage_key=f"adapter-studio-{name}-job", secret=SECRET)
    job.change(lambda job_id: job_id, job, kept, **PRIVATE)
    return kept


def values(kept: Any, count: int) -> list[Any] | None:
    """The kept values if there are ``count``; None if there are none, or they are of another version's form."""
    return kept if isinstance(kept, list) and len(kept) == count else None
