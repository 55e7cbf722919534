"""The address the app listens on and the names it answers to."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from adapters.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")


def bare(host: str) -> str:
    """A host without the brackets that addresses put around IPv6: ``[::1]`` -> ``::1``."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def netloc(host: str, port: int) -> str:
    """Host and port as a browser takes them: ``[::1]:7860``."""
    return f"[{bare(host)}]:{port}" if ":" in bare(host) else f"{host}:{port}"


def url(host: str, port: int, root_path: str = "") -> str:
    """The app's address for a browser: ``root_path`` if it is a whole address (of a proxy)."""
    return root_path if "://" in root_path else f"http://{netloc(host, port)}{root_path}"


def check_access(host: str, password: str | None, share: bool) -> None:
    """Raise :class:`InputError` if strangers could use the app."""
    if not password and (share or bare(host) not in LOOPBACK):
        raise InputError("Others could reach the app, and with it this computer: give a password too (--password).")


def check_address(host: str, port: int) -> None:
    """Raise :class:`InputError` unless the app can listen there."""
    try:
        kind, *_, address = socket.getaddrinfo(bare(host), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (socket.gaierror, UnicodeError):
        raise InputError(f"'{host}' is not an address of this computer: try 127.0.0.1 or 0.0.0.0.") from None
    except (OverflowError, OSError) as error:
        raise InputError(_why_not(host, port, error)) from None


def _why_not(host: str, port: int, error: Exception) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.EADDRINUSE:
        return f"Port {port} is taken by another program (perhaps another studio): choose one with --port {port + 1}."
    if code == errno.EACCES:
        return f"Port {port} needs more rights than you have: choose one above 1023 with --port."
    if code == errno.EADDRNOTAVAIL:
        return f"'{host}' is not an address of this computer: try 127.0.0.1 or 0.0.0.0."
    return f"The app cannot listen on {netloc(host, port)} ({error}): choose another --host or --port."


def check_root_path(root_path: str) -> str:
    """The path (or whole address) under which a proxy serves the app, without a trailing slash.

    Raises:
        InputError: it is neither a path that begins with / nor an http(s) address.
    """
    given = root_path.rstrip("/")
    parts = urlsplit(given)
    if not given or (given.startswith("/") and not given.startswith("//") and not parts.query):
        return given
    if parts.scheme in ("http", "https") and parts.hostname and not parts.query:
        return given
    raise InputError(
        f"--root-path '{root_path}' is neither a path like /studio nor an address like https://host/studio."
    )


@dataclass(frozen=True)
class Names:
    """The host names that requests may use.

    Attributes:
        own: names of this computer that are always right.
        further: names added with --allow-host; ``*.example.org`` stands for all below it.
        any_number: IP addresses are right too (the app listens on all; only names can be pointed at us by others).
    """

    own: frozenset[str]
    further: frozenset[str] = frozenset()
    any_number: bool = False

    def answer(self, host: str | None) -> bool:
        """Whether a ``Host`` header, with or without a port, is one of ours."""
        name = hostname(host)
        return name in self.own or self.invited(name) or (self.any_number and _is_number(name))

    def invited(self, name: str) -> bool:
        """Whether the name is one that was added."""
        return any(
            name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:])) for pattern in self.further
        )

    def may_send(self, origin: str, host: str | None) -> bool:
        """Whether a page at ``origin`` may send to ``host``: the app's own page, or one at an added name."""
        parts = _split(origin)
        if parts is None:
            return False
        scheme, name, port = parts
        target = _split(f"{scheme}://{host}")
        return self.invited(name) or (target is not None and target[1:] == (name, port))


def names(host: str, further: Iterable[str] = (), root_path: str = "", share: bool = False) -> Names:
    """The names the app answers to when it listens on ``host``.

    Args:
        further: more names, as ``studio.example.org`` or ``*.example.org``.
        root_path: the app's path or whole address at a proxy.
        share: answer to Gradio's public links as well.

    Raises:
        InputError: one of ``further`` is not a host name.
    """
    more = {_name(given) for given in further}
    if "://" in root_path:
        more.add(hostname(urlsplit(root_path).netloc))
    if share:
        more.add("*.gradio.live")
    everywhere = bare(host) in EVERYWHERE
    own = {*LOOPBACK, bare(host).lower()} | ({socket.gethostname().lower()} if everywhere else set())
    return Names(frozenset(own), frozenset(more), everywhere)


def hostname(host: str | None) -> str:
    """The name in a ``Host`` header, in lower case and without the port; empty if the header is malformed."""
    parts = _split(f"http://{host or ''}")
    return parts[1] if parts else ""


def _name(given: str) -> str:
    name = hostname(given.removeprefix("*."))
    if not name or "*" in name:
        raise InputError(f"--allow-host '{given}' is not a host name: write studio.example.org or *.example.org.")
    return f"*.{name}" if given.startswith("*.") else name


def _split(origin: str) -> tuple[str, str, int] | None:
    """Scheme, name and port of an origin; None if it is not one (``null``, a path, a wrong port)."""
    try:
        parts = urlsplit(origin)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        return None
    name = (parts.hostname or "").rstrip(".")
    plain = not (parts.path or parts.query or parts.fragment or "@" in parts.netloc)
    return (parts.scheme, name, port) if name and plain else None


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
