"""Where the server listens, and to whom it answers."""

from __future__ import annotations

import socket
from collections.abc import Iterable

from adapters.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_open(host: str, api_key: str) -> None:
    """Raise :class:`InputError` if others could reach the server without a key."""
    if host not in LOOPBACK and not api_key:
        raise InputError(f"Others could reach the server at '{host}': give a key that they must know (--api-key).")


def listening(host: str, port: int, api_key: str) -> socket.socket:
    """A socket bound to the address; port 0 takes a free one.

    Raises:
        InputError: others could reach the server without a key, or nothing can listen there.
    """
    check_open(host, api_key)
    try:
        kind, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(place)
    except (socket.gaierror, UnicodeError):
        raise InputError(f"'{host}' is not an address of this computer: try 127.0.0.1 or 0.0.0.0.") from None
    except (OSError, OverflowError) as error:
        raise InputError(f"The server cannot listen at {host}:{port} ({error}): choose another --port.") from None
    return made


def names(host: str, further: Iterable[str]) -> tuple[str, ...]:
    """Names that a client may call the server by; "*" = any, for a server with a key that listens to the network."""
    further = tuple(further)
    if host in LOOPBACK or further:
        return (*LOOPBACK, "[::1]", host, *further)
    return ("*",)
