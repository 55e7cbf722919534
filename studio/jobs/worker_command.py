"""``studio worker``: work on queued jobs in this terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from studio.cli.output import Json, Output, Quiet, moment, table


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("worker", help="Work on queued jobs in this terminal.")(worker)


def worker(
    queue: Annotated[
        str, typer.Option("--queue", help="Queue to serve: default, or a device (cpu, cuda:1 ...).")
    ] = "default",
    idle_minutes: Annotated[
        float, typer.Option("--idle-minutes", help="Stop after being idle this long; 0 = never.")
    ] = 0.0,
    list_: Annotated[bool, typer.Option("--list", help="Show the running workers and exit.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Work on queued jobs in this terminal."""
    from studio.jobs import worker as process

    output = Output(json, quiet)
    if list_:
        rows = process.running()
        output.result(
            rows,
            lambda: table(["queue", "host", "process", "since"],
                          [(r["queue"], r["host"], r["pid"], moment(r["started"])) for r in rows]),
        )  # fmt: skip
        return
    if not quiet:
        import logging

        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
        logging.getLogger("studio").setLevel(logging.INFO)
    output.note(f"Working on the queue '{queue}'; Ctrl-C stops it at the job's next safe point.")
    if process.serve(queue, idle_minutes):
        process.renew()
