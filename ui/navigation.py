"""The pages, their groups in the menu, and their addresses.

Every page is a tab of one app, so that pages can fill each other's forms; the tab bar is hidden and replaced by the
menu at the side. A page's address is its key (``/train``); other words that people may try lead there too.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote

import gradio as gr

from ui import markup
from ui.asgi import Asgi, Message, Receive, Scope, Send
from ui.theme import script


@dataclass(frozen=True)
class Place:
    """A page: its key (address and tab), its title, and other words for its address."""

    key: str
    title: str
    also: tuple[str, ...] = ()


GROUPS: tuple[tuple[str, tuple[Place, ...]], ...] = (
    (
        "Images",
        (
            Place("compose", "Compose", ("images", "generate", "create")),
            Place("gallery", "Gallery", ("pictures", "history")),
            Place("train", "Train", ("training", "distill")),
        ),
    ),
    (
        "Language",
        (
            Place("language", "Chat and train", ("chat", "text", "llm")),
            Place("ask", "Ask about pictures", ("vision", "vlm", "see")),
        ),
    ),
    ("Speech", (Place("speech", "Speech", ("transcribe", "whisper", "audio")),)),
    ("Genomics", (Place("rna", "Classify RNA", ("genomics", "fasta", "lncrna")),)),
    ("Together", (Place("federated", "Federated", ("federate", "federation", "clients")),)),
    ("3D", (Place("reconstruct", "Reconstruct", ("3d", "scenes", "scene")),)),
    (
        "Yours",
        (
            Place("library", "Library", ("adapters", "models", "bases")),
            Place("jobs", "Jobs", ("queue", "runs")),
        ),
    ),
)
"""The menu."""

PLACES = tuple(place for _, places in GROUPS for place in places)
START = PLACES[0].key
ADDRESSES = {word: place.key for place in PLACES for word in (place.key, *place.also)}
"""Address -> key of the page."""

TITLES = {place.key: place.title for place in PLACES}


def page_at(path: str) -> str:
    """Key of the page at a browser's path (``/train``); the first page for an unknown path."""
    return ADDRESSES.get(path.rstrip("/").rpartition("/")[2].lower(), START)  # a proxy may serve us below a path


def menu() -> gr.HTML:
    """The menu. It follows the tabs and keeps the browser's address, title and history in step."""
    groups = "".join(
        f"<section><h2>{markup.text(title)}</h2><ul>{''.join(map(_link, places))}</ul></section>"
        for title, places in GROUPS
    )
    return gr.HTML(
        '<nav class="as-nav" aria-label="Pages"><button type="button" class="as-nav-open" aria-expanded="false">'
        f'<span>Menu</span><b></b></button><div class="as-nav-pages">{groups}</div></nav>',
        elem_id="nav", js_on_load=script("navigation"), apply_default_css=False,
    )  # fmt: skip


def _link(place: Place) -> str:
    return f'<li><a href="{markup.text(place.key)}" data-page="{place.key}">{markup.text(place.title)}</a></li>'


class Addresses:
    """ASGI middleware: every page's address serves the app, and an unknown address gets a page that says so."""

    def __init__(self, app: Asgi) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope.get("method") not in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        word = scope["path"].strip("/")
        if scope["path"] != f"/{word}" and word.lower() in (*ADDRESSES, ""):  # //train: links in it would go astray
            await _moved(scope, word, send)
            return
        if word.lower() in ADDRESSES:
            await self.app({**scope, "path": "/", "raw_path": b"/"}, receive, send)
            return
        await self.app(scope, receive, _explaining(scope, send) if _wants_page(scope) else send)


async def _moved(scope: Scope, word: str, send: Send) -> None:
    """Send the browser to the page's own address."""
    query = b"?" + scope["query_string"] if scope.get("query_string") else b""
    place = f"{scope.get('root_path', '')}/{word}".encode() + query
    headers = [(b"location", place), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 307, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _wants_page(scope: Scope) -> bool:
    """Whether a browser asks for a page, rather than a program or an image tag for a file."""
    accepted = b",".join(value for name, value in scope.get("headers", ()) if name == b"accept")
    return b"text/html" in accepted


def _explaining(scope: Scope, send: Send) -> Send:
    """``send``, but with a page in place of a bare 404."""
    replaced = False

    async def sending(message: Message) -> None:
        nonlocal replaced
        if message["type"] == "http.response.start" and message["status"] == 404:
            replaced = True
            page = unknown(unquote(scope["path"]), str(scope.get("root_path", ""))).encode()
            headers = [(b"content-type", b"text/html; charset=utf-8"), (b"content-length", str(len(page)).encode())]
            await send({**message, "headers": headers})
            await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else page})
        elif not replaced:
            await send(message)

    return sending


def unknown(path: str, root: str = "") -> str:
    """The page at an unknown address; ``root`` is the path of the app at a proxy."""
    links = "".join(
        f'<li><a href="{markup.text(root)}/{place.key}">{markup.text(place.title)}</a></li>' for place in PLACES
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<title>No such page · Adapter Studio</title><style>body{font:16px/1.6 system-ui,sans-serif;max-width:34rem;"
        "margin:12vh auto;padding:0 1.2rem;color-scheme:light dark}a{color:#6f67d9}</style>"
        f"<h1>There is no page here</h1><p>Adapter Studio has nothing at <b>{markup.text(path[:200])}</b>. "
        f"Its pages are:</p><ul>{links}</ul></html>"
    )
