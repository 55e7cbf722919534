"""``studio demo``: every composition method on the shipped adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from studio import silence
from studio.cli.output import Json, Output, Quiet, duration


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo", help="Compose the shipped adapters with every method, side by side.")(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")] = Path("studio-demo"),
    steps: Annotated[int, typer.Option("--steps", min=1, help="Denoising steps.")] = 10,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of every picture.")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compose the shipped adapters with every method, side by side."""
    from adapters.errors import InputError
    from studio.cli.terminal import Terminal
    from studio.composition import demo as job

    silence.library_warnings()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: the folder '{out}' cannot be created ({error.strerror}).") from None
    output = Output(json, quiet)
    with Terminal(quiet) as terminal:
        result = job.run(out, terminal, steps=steps, seed=seed)
    lines = [
        f"{len(result['pictures'])} pictures in {duration(result['seconds'])}: {out.resolve()}",
        f"Side by side:  {Path(result['grid']).resolve()}",
        "Each picture carries its recipe; repeat one with  studio compose --from PICTURE",
        "Make your own in the web app:  studio ui",
    ]
    output.result({**result, "out": str(out.resolve()), "app": "studio ui"}, "\n".join(lines))
