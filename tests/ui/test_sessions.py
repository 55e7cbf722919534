"""Closed pages are forgotten, open ones are not."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from tests.loops import run
from ui.sessions import Sessions


def app_of(pages: list[str]) -> Any:
    """What Gradio keeps of pages."""
    queue = SimpleNamespace(
        pending_event_ids_session={page: set() for page in pages}, pending_messages_per_session=dict.fromkeys(pages)
    )
    holder = SimpleNamespace(session_data=dict.fromkeys(pages), time_last_used=dict.fromkeys(pages))
    return SimpleNamespace(state_holder=holder, get_blocks=lambda: SimpleNamespace(_queue=queue))


async def connect(sessions: Sessions, app: Any, page: str) -> None:
    await sessions({"type": "http", "path": f"/gradio_api/heartbeat/{page}", "app": app}, None, None)  # type: ignore[arg-type]


def test_the_last_closed_pages_are_kept() -> None:
    async def nothing(*_: Any) -> None:
        return None

    async def scenario() -> None:
        sessions = Sessions(nothing, closed=2)
        app = app_of(["a", "b", "c", "d"])
        for page in "abcd":
            await connect(sessions, app, page)
        assert set(app.state_holder.session_data) == {"c", "d"} == set(app.state_holder.time_last_used)
        assert set(app.get_blocks()._queue.pending_messages_per_session) == {"c", "d"}

    run(scenario())


def test_an_open_page_is_never_forgotten() -> None:
    async def scenario() -> None:
        gates = {page: asyncio.Event() for page in "abc"}

        async def until_closed(scope: Any, *_: Any) -> None:
            await gates[scope["path"][-1]].wait()

        sessions = Sessions(until_closed, closed=0)
        app = app_of(["a", "b", "c"])
        first = asyncio.create_task(connect(sessions, app, "a"))
        again = asyncio.create_task(connect(sessions, app, "a"))  # its connection was made anew
        other = asyncio.create_task(connect(sessions, app, "b"))
        await asyncio.sleep(0)
        first.cancel()
        gates["b"].set()
        await asyncio.gather(first, other, return_exceptions=True)
        assert set(app.state_holder.session_data) == {"a", "c"}
        gates["a"].set()
        await again
        assert set(app.state_holder.session_data) == {"c"}

    run(scenario())
