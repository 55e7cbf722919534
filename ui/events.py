"""How the pages' events run."""

from __future__ import annotations

from typing import Any

PRIVATE: dict[str, Any] = {"show_progress": "hidden", "show_progress_on": [], "api_visibility": "private"}
"""Arguments of an event that belongs to the page: no public endpoint and no progress of its own.

No component carries its status: Gradio updates every component that ever carried one whenever any event starts or ends,
and looks each up in the whole page.
"""
