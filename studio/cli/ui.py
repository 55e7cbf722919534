"""``studio ui``: the web app."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from adapters.errors import InputError
from studio.cli.output import Json, Output, Quiet


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("ui", help="Open the web app.")(ui)


def ui(
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 = all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on.", min=1, max=65535)] = 7860,
    password: Annotated[
        str | None, typer.Option("--password", help="Ask for this password.", envvar="ADAPTER_STUDIO_PASSWORD")
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser window.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Open the web app; it runs until Ctrl-C."""
    check_port(host, port)
    output = Output(json, quiet)
    if host not in ("127.0.0.1", "localhost", "::1") and not password:
        output.note(f"Everybody who reaches {host} can use the studio: a --password would change that.")
    from ui.app import launch

    address = f"http://{host}:{port}"
    output.result({"url": address}, f"Adapter Studio runs at {address}  (Ctrl-C ends it)")
    launch(host=host, port=port, password=password, open_browser=open_browser)


def check_port(host: str, port: int) -> None:
    """Raise :class:`InputError` when the port is taken or the address is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise InputError(f"Port {port} needs special rights: choose one above 1023 with --port.") from None
        except OSError as error:
            if error.errno is not None and "in use" in str(error):
                raise InputError(f"Port {port} is taken by another program: choose another with --port.") from None
            raise InputError(f"'{host}' is no address of this machine ({error.strerror}).") from None
