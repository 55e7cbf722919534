"""``studio methods``: the list of methods."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from studio.cli.output import Json, Output, Quiet, table


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("methods", help="List the methods and the papers they come from.")(methods)


def methods(
    stage: Annotated[str | None, typer.Option("--stage", help="Only this stage (compose, learn, merging ...).")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the methods and the papers they come from."""
    from adapters.errors import InputError, nearest
    from studio.catalogue import declared

    found = declared()
    stages = sorted({method.stage for method in found})
    if stage is not None and stage not in stages:
        raise InputError(f"There is no stage '{stage}'{nearest(stage, stages)}: choose {', '.join(stages)}.")
    chosen = [method for method in found if stage in (None, method.stage)]
    Output(json, quiet).result(
        [asdict(method) for method in chosen],
        lambda: table(
            ["stage", "method", "what it does", "makes", "paper", "status"],
            [(m.stage, m.name, m.summary, m.makes, m.paper, m.status) for m in chosen],
        ),
    )
