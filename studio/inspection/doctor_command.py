"""``studio doctor``: will these adapters get along?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.errors import InputError
from studio.cli.output import Json, Output, Quiet, facts, table
from studio.composition import lora_option

if TYPE_CHECKING:
    from adapters.inspection.doctor import Diagnosis


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER[:WEIGHT]...", help="Adapters to use together, with strengths.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", help="Prompt to check for trigger words.")] = "",
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Plot the overlaps in this .png file.", rich_help_panel="Output")
    ] = None,
    base: Annotated[str, typer.Option("--base", help="Base model that resolves module names.")] = "",
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Compare adapters that are to be used together: overlap, strengths, trigger words, and what to do."""
    from studio import silence
    from studio.inspection import doctor as clinic

    output = Output(json, quiet)
    silence.library_warnings()
    uses = [lora_option.parse(text) for text in adapters]
    if plot is not None and plot.suffix.lower() != ".png":
        raise InputError(f"--plot: pictures are written as .png, got '{plot.suffix}'.")
    weights = [float(use.get("weight", 1.0)) for use in uses]
    found = clinic.diagnose([use["path"] for use in uses], prompt, weights, base)
    if plot is not None:
        from adapters import files

        drawn = clinic.picture(found)
        files.write(plot, lambda part: drawn.save(part, format="PNG"))
        output.note(f"Plotted to {plot}")
    output.result(found.to_dict(), lambda: _shown(found))


def _shown(found: Diagnosis) -> Any:
    from rich.console import Group

    rows: list[tuple[Any, ...]] = [
        (
            f"{pair.first} + {pair.second}", pair.level, f"{pair.interference:.1%}", f"{pair.overlap.chance:.2%}",
            f"{pair.overlap.inputs:.0%}", f"{pair.overlap.outputs:.0%}", f"{pair.overlap.cosine:+.2f}",
            len(pair.overlap.layers), f"{pair.ratio:.2f}", ", ".join(pair.words),
        )
        for pair in found.pairs
    ]  # fmt: skip
    columns = (
        "pair", "interference", "shared", "chance", "inputs", "outputs", "cosine", "layers", "ratio", "same words",
    )  # fmt: skip
    advice = found.advice
    strengths = ", ".join(f"{name} {size:.3g} in {found.layers[name]} layers" for name, size in found.strengths.items())
    told: list[tuple[str, Any]] = [
        ("strengths", strengths),
        *(("note", remark) for remark in found.remarks),
        ("advice", f"method {advice.method}{', with a region for each' if advice.regions else ''}"),
        ("weights", ", ".join(f"{name}:{weight:g}" for name, weight in advice.weights.items())),
        *(("because", reason) for reason in advice.reasons),
    ]
    return Group(*([table(columns, rows)] if rows else []), facts(told))
