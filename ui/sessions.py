"""What the server keeps of open pages, and frees when they are closed.

Gradio keeps a description of every component for each page that was ever opened (about 2 MB for this app), up to
``state_session_capacity`` pages, and clears only the values of ``gr.State`` an hour after a page was closed. Here the
last few closed pages are kept, so that a page whose connection broke continues where it was; older ones are dropped.

What Gradio keeps of a page refers to itself, so it is freed only when Python next collects cycles, which in a large
process may be much later; and the C library returns memory to the system only when asked. Both are done here, once
for several dropped pages.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections import Counter
from typing import Any

from ui.access import API
from ui.asgi import Asgi, Receive, Scope, Send

CLOSED = 20
"""How many closed pages are kept."""

FREED_TOGETHER = 10
"""How many dropped pages are freed at once."""

OPEN = 200
"""Pages that may be open at once; beyond that the one used longest ago loses its state (Gradio's own setting)."""

_ARENA_MAX = -8  # M_ARENA_MAX of glibc's malloc.h

_HEARTBEAT = f"{API}heartbeat/"


class Sessions:
    """ASGI middleware: a page holds a connection ("heartbeat") while it is open; when it ends, the page is closed."""

    def __init__(self, app: Asgi, closed: int = CLOSED) -> None:
        """Keep the last ``closed`` closed pages."""
        self.app, self.kept = app, closed
        self.open: Counter[str] = Counter()
        self.closed: dict[str, None] = {}
        self.forgotten = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and note when a heartbeat begins and ends."""
        if scope["type"] != "http" or not scope["path"].startswith(_HEARTBEAT):
            return await self.app(scope, receive, send)
        page = scope["path"].removeprefix(_HEARTBEAT).strip("/")
        self.open[page] += 1
        self.closed.pop(page, None)
        try:
            return await self.app(scope, receive, send)
        finally:
            self._ended(page, scope["app"])

    def _ended(self, page: str, app: Any) -> None:
        self.open[page] -= 1
        if self.open[page] > 0:
            return
        del self.open[page]
        self.closed[page] = None
        while len(self.closed) > self.kept:
            oldest = next(iter(self.closed))
            del self.closed[oldest]
            _forget(app, oldest)
            self.forgotten += 1
            if self.forgotten % FREED_TOGETHER == 0:
                threading.Thread(target=_free, name="free closed pages", daemon=True).start()


def _forget(app: Any, page: str) -> None:
    """Drop what Gradio holds of a page; if the page comes back, it starts afresh."""
    app.state_holder.session_data.pop(page, None)
    app.state_holder.time_last_used.pop(page, None)
    queue = app.get_blocks()._queue
    if not queue.pending_event_ids_session.get(page):
        queue.pending_event_ids_session.pop(page, None)
        queue.pending_messages_per_session.pop(page, None)


def bound_memory() -> None:
    """Before the app is built: what grows with the number of events and threads stays small.

    Gradio remembers 10,000 events for its monitoring page, which is off here; glibc keeps a heap for every thread.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")
    _glibc("mallopt", _ARENA_MAX, 2)


def _free() -> None:
    """Free the memory of dropped pages, and with glibc return it to the system."""
    gc.collect()
    _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> None:
    """Call a function of glibc, where that is the C library."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
