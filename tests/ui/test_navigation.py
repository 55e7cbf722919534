"""Addresses: what leads to a page, and what is sent to its own address."""

from __future__ import annotations

from typing import Any

import pytest

from tests.loops import run
from ui.navigation import Addresses


def answer(path: str, **scope: Any) -> tuple[int, str]:
    """Status and place of the answer to a browser; 200 and the path where the app answers."""
    sent: list[Any] = []

    async def app(inner: Any, receive: Any, send: Any) -> None:
        sent.append({"status": 200, "headers": [(b"location", inner["path"].encode())]})

    async def send(message: Any) -> None:
        sent.append(message)

    asked = {"type": "http", "method": "GET", "path": path, **scope}
    run(Addresses(app)(asked, None, send))  # type: ignore[arg-type]
    return sent[0]["status"], dict(sent[0]["headers"])[b"location"].decode()


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/", (200, "/")),
        ("/train", (200, "/")),
        ("//train", (307, "/train")),
        ("/train/", (307, "/train")),
        ("//", (307, "/")),
        ("//example.org", (200, "//example.org")),  # nothing of ours, and never a way to another site
        ("/gradio_api/file=/a//b.png", (200, "/gradio_api/file=/a//b.png")),
    ],
)
def test_odd_slashes_lead_to_the_page(path: str, wanted: tuple[int, str]) -> None:
    assert answer(path) == wanted


def test_a_moved_page_keeps_its_question_and_its_proxy() -> None:
    assert answer("//train", query_string=b"a=1", root_path="/studio") == (307, "/studio/train?a=1")
