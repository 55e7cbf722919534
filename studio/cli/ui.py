"""``studio ui``: the web app.

Pages may import ``studio``, never the other way round; so they are imported by name here.
"""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from studio.cli.output import Json, Output, Quiet


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("ui", help="Open the web app.")(ui)


def ui(
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 = the whole network (needs a password).")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on.", min=1, max=65535)] = 7860,
    password: Annotated[
        str | None, typer.Option("--password", help="Ask for this password.", envvar="ADAPTER_STUDIO_PASSWORD")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also open a public link through Gradio's server (needs a password).")
    ] = False,
    max_upload: Annotated[str, typer.Option("--max-upload", help="Largest file that may be uploaded.")] = "200mb",
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser window.")] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="Another host name to answer to, such as a proxy's; *.example.org works."),
    ] = None,
    root_path: Annotated[
        str, typer.Option("--root-path", help="Path (/studio) or address under which a proxy serves the app.")
    ] = "",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Open the web app; it runs until Ctrl-C."""
    from studio import jobs

    jobs.clean()
    if jobs.list(1, ["queued"]):
        jobs.ensure_worker()  # jobs left waiting when the app or the computer was last shut down
    address, pages = importlib.import_module("ui.address"), importlib.import_module("ui.app")
    address.check_access(host, password, share)
    address.check_address(host, port)
    address.names(host, allow_host or ())
    url = address.url(host, port, address.check_root_path(root_path))
    Output(json, quiet).result({"url": url}, f"Adapter Studio opens at {url}  (Ctrl-C stops it)")
    pages.launch(
        host=host, port=port, password=password, share=share, max_upload=max_upload, open_browser=open_browser,
        allow_hosts=allow_host or (), root_path=root_path,
    )  # fmt: skip
