"""Who may use the app, and how often passwords may be tried.

A browser sends the requests of any page it shows, so listening on this computer only is no protection by itself: a
foreign page can send forms to the app (cross-site request forgery), or be served under a name that its owner then
points at 127.0.0.1, and read the answers (DNS rebinding). Requests must therefore name one of our hosts and come from
one of our pages; see :class:`ui.address.Names`.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import math
import time
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from ui.address import Names, hostname
from ui.asgi import Asgi, Message, Receive, Scope, Send

Headers = dict[bytes, bytes]

API = "/gradio_api/"
BEFORE_LOGIN = ("app_id", "login_check", "startup-events", "theme.css", "token", "user")
"""What the sign-in page itself requests; the rest of the API needs the password."""

SHOWN = ("audio/", "font/", "image/", "model/", "video/", "application/json", "text/plain")
"""Kinds of files that a browser may show in place. Others, above all HTML, could run scripts as one of our pages."""
PROGRAMS = ("image/svg+xml",)


class Access:
    """ASGI middleware: refuses foreign hosts and origins, requires the sign-in everywhere, and slows guessing down."""

    def __init__(self, app: Asgi, names: Names, attempts: Attempts | None = None, root_path: str = "") -> None:
        """Guard ``app``.

        Args:
            attempts: limits sign-ins; None = the app has no password.
            root_path: the app's path at a proxy, which may pass it on or strip it.
        """
        self.app, self.names, self.attempts, self.root = app, names, attempts, urlsplit(root_path).path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request or pass it on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers: Headers = dict(scope["headers"])
        refusal = self._refusal(headers)
        if refusal:
            return await _answer(send, 403, refusal)
        if self.root and f"{scope['path']}/".startswith(f"{self.root}/"):
            scope = {**scope, "path": scope["path"].removeprefix(self.root) or "/"}
        path = str(scope["path"]).rstrip("/")
        if self.attempts and scope["method"] == "POST" and path == "/login":
            return await self._sign_in(self.attempts, scope, receive, send)
        if self.attempts and path.startswith(API) and not _public(path) and not _signed_in(scope, headers):
            return await _answer(send, 401, "Not signed in: open the first page and give the password.")
        if path.startswith((f"{API}file=", f"{API}file/")):
            send = _downloading(send)
        return await self.app(scope, receive, send)

    def _refusal(self, headers: Headers) -> str:
        host, origin = _text(headers, b"host"), _text(headers, b"origin")
        if not self.names.answer(host):
            name = hostname(host)
            if not name:
                return "The request does not say which host it is for."
            return (
                f"This studio does not answer to the name '{name}': if it is right, start it with --allow-host {name}."
            )
        if origin and not self.names.may_send(origin, host):
            return (
                "Pages of other sites may not use this studio; if this is its own page behind a proxy, "
                "start it with --allow-host and the proxy's name."
            )
        return ""

    async def _sign_in(self, attempts: Attempts, scope: Scope, receive: Receive, send: Send) -> None:
        client = _client(scope)
        wait = attempts.wait(client)
        if wait is None:
            retry = math.ceil(attempts.patience)
            return await _answer(send, 429, f"Too many wrong passwords: try again in {retry} seconds.", retry)
        await asyncio.sleep(wait)  # only this request waits

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                attempts.give_back(client)
            await send(message)

        return await self.app(scope, receive, watched)


class Pace:
    """Per key at most ``burst`` events at once, then one per ``gap`` seconds.

    The generic cell rate algorithm (ITU-T I.371): one number per key, the time at which the next event would be due had
    all earlier ones kept the gap.
    """

    def __init__(self, gap: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        """``gap`` in seconds."""
        self.gap, self.burst, self.clock = gap, burst, clock
        self.due: dict[str, float] = {}

    def delay(self, key: str) -> float:
        """Seconds until an event of ``key`` may happen."""
        return max(0.0, self.due.get(key, -math.inf) - (self.burst - 1) * self.gap - self.clock())

    def count(self, key: str, events: int = 1) -> None:
        """Count an event (or, with -1, take one back)."""
        now = self.clock()
        self.due[key] = max(self.due.get(key, now), now) + events * self.gap
        if len(self.due) > 1000:
            self.due = {name: due for name, due in self.due.items() if due > now}


class Attempts:
    """How often passwords may be tried: by one client, and by all together (addresses are cheap).

    An attempt that comes too fast waits for up to ``patience`` seconds and is refused beyond that, right or wrong; a
    right one does not count.
    """

    def __init__(self, patience: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        """Allow each client 5 at once and one per second; all together 50 at once and 10 per second."""
        self.patience = patience
        self.each, self.together = Pace(1.0, 5, clock), Pace(0.1, 50, clock)

    def wait(self, client: str) -> float | None:
        """Seconds to wait before this attempt is checked; None = refuse it."""
        delay = max(self.each.delay(client), self.together.delay(""))
        if delay > self.patience:
            return None
        self._count(client, 1)
        return delay

    def give_back(self, client: str) -> None:
        """Take back an attempt that was right."""
        self._count(client, -1)

    def _count(self, client: str, events: int) -> None:
        self.each.count(client, events)
        self.together.count("", events)


def asks_for(password: str) -> Callable[[str, str], bool]:
    """A password check for Gradio that takes equally long for every wrong one."""

    def check(_name: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), password.encode())

    return check


# ------------------------------------------------------------------------------------------------ parts of a request


def _text(headers: Headers, name: bytes) -> str | None:
    value = headers.get(name)
    return None if value is None else value.decode("latin-1")


def _public(path: str) -> bool:
    return path.removeprefix(API) in BEFORE_LOGIN


def _signed_in(scope: Scope, headers: Headers) -> bool:
    """Whether the request has the cookie of a sign-in that Gradio knows."""
    app = scope["app"]
    try:
        cookies = SimpleCookie(_text(headers, b"cookie") or "")
    except CookieError:
        return False
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return any(name in cookies and cookies[name].value in app.tokens for name in names)


def _client(scope: Scope) -> str:
    """The client's address; for IPv6 its /64 network, which one household shares."""
    host = str((scope.get("client") or ("",))[0])
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return host
    return str(ipaddress.ip_network((number, 64), strict=False)) if number.version == 6 else host


# ------------------------------------------------------------------------------------------------ answers


def _downloading(send: Send) -> Send:
    """Have files that could run as one of our pages saved instead of shown."""

    async def changed(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [(name, value) for name, value in message["headers"] if name != b"x-content-type-options"]
            headers.append((b"x-content-type-options", b"nosniff"))
            kind = dict(headers).get(b"content-type", b"").decode("latin-1").split(";")[0].strip().lower()
            if message["status"] < 300 and (not kind.startswith(SHOWN) or kind in PROGRAMS):
                given = dict(headers).get(b"content-disposition", b"")
                headers = [(name, value) for name, value in headers if name != b"content-disposition"]
                headers.append((b"content-disposition", b"attachment" + b"".join(given.partition(b";")[1:])))
            message = {**message, "headers": headers}
        await send(message)

    return changed


async def _answer(send: Send, status: int, sentence: str, retry: int = 0) -> None:
    body = sentence.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode()),
        (b"x-content-type-options", b"nosniff"), *([(b"retry-after", str(retry).encode())] if retry else []),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
