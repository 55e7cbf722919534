"""``studio classify rna``: a FASTA file becomes a table of labels and probabilities."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters import files
from studio import silence
from studio.cli.output import Json, Output, Quiet
from studio.cli.schema_options import with_options
from studio.genomics.schema import ClassifyRnaConfig
from studio.training.commands import launch

HELP = "Tell RNA transcripts apart: long non-coding or messenger RNA."


def register(app: typer.Typer) -> None:
    """Add the command."""
    group = typer.Typer(no_args_is_help=True)
    group.command("rna", help=HELP)(with_options(ClassifyRnaConfig, skip=["file"])(rna))
    group.callback()(_group)
    app.add_typer(group, name="classify", help=HELP)


def _group() -> None:
    """Tell records of a file apart."""


def rna(
    fields: dict[str, Any],
    fasta: Annotated[Path, typer.Argument(help="FASTA file, plain or compressed.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where the table goes (.tsv); without it, the folder of the job.",
                     rich_help_panel="Output"),
    ] = None,
    detach: launch.Detach = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Tell RNA transcripts apart."""
    from studio import jobs
    from studio.jobs import kinds

    output = Output(json, quiet)
    silence.library_warnings()
    silence.loading_bars()
    config = ClassifyRnaConfig.parse({**fields, "file": str(fasta.expanduser().absolute())}, source="classify rna")
    kinds.find(config.kind).check(config)
    if detach:
        launch.detach(config.kind, config, output)
        return
    job = launch.here(lambda terminal: jobs.run_here(config.kind, config, terminal), output)
    result = dict(job.result or {})
    if out is not None:
        result["table"] = str(files.write(out.expanduser(), lambda part: shutil.copyfile(result["table"], part)))
    output.result({"job": job.id, **result}, lines(result))


def lines(result: dict[str, Any]) -> str:
    """The result for people."""
    counts = ", ".join(f"{count} {label}" for label, count in result["counts"].items()) or "none"
    told = [f"{result['transcripts']} transcripts: {counts}", *(f"{remark}." for remark in result["remarks"])]
    return "\n".join([*told, f"table: {result['table']}"])
