"""``studio inspect``: what training did to a model's weights, and what a mixture does with tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.errors import InputError
from studio.cli.output import Json, Output, Quiet, facts, table
from studio.cli.terminal import Terminal

if TYPE_CHECKING:
    from adapters.inspection.intruders import Report
    from studio.inspection.experts import Report as ExpertsReport

Base = Annotated[str, typer.Option("--base", help="The untouched base model: name in the library, folder or hub id.")]
K = Annotated[int, typer.Option("--k", min=1, help="How many of the largest singular directions to compare.")]
Eps = Annotated[float, typer.Option("--eps", help="An intruder's cosines with the base's directions are below this.")]
Adapter = Annotated[str, typer.Argument(help="Name in the library, file or PEFT folder.")]

group = typer.Typer(
    help="What training did to the weights: intruder dimensions, forgetting; what experts do.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(group, name="inspect")


@group.command()
def intruders(
    base: Base,
    adapter: Annotated[str, typer.Argument(help="Name in the library, file or PEFT folder.")] = "",
    tuned: Annotated[str, typer.Option("--tuned", help="Instead of an adapter: a fine-tuned model.")] = "",
    k: K = 10,
    eps: Eps = 0.5,
    side: Annotated[str, typer.Option("--side", metavar="left|right|both", help="Which singular vectors.")] = "left",
    from_files: Annotated[
        bool,
        typer.Option("--files", help="Read the weights from .safetensors files or folders without building the model."),
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Plot every layer in this .png file.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Count intruder dimensions per layer: directions among a weight's largest that the base does not have.

    Example:  studio inspect intruders fox --base tinymoji
    """
    from studio import silence
    from studio.inspection import intruders

    output = Output(json, quiet)
    silence.library_warnings()
    silence.loading_bars()
    if plot is not None and plot.suffix.lower() != ".png":
        raise InputError(f"--plot: pictures are written as .png, got '{plot.suffix}'.")
    with Terminal(quiet) as terminal:
        report = intruders.intruders(adapter, base, tuned, k, eps, side, terminal, from_files)  # type: ignore[arg-type]
    if plot is not None:
        from adapters import files

        drawn = intruders.picture(report)
        files.write(plot, lambda part: drawn.save(part, format="PNG"))
        output.note(f"Plotted to {plot}")
    output.result(report.to_dict(), lambda: _shown(report))


@group.command()
def soften(
    adapter: Adapter,
    base: Base,
    out: Annotated[Path, typer.Option("--out", "-o", help="The new file (diffusers), or a folder (peft).")],
    strength: Annotated[
        float, typer.Option("--lambda", help="0 removes intruders, 1 changes nothing, more amplifies them.")
    ] = 0.75,
    control: Annotated[
        Path | None,
        typer.Option("--control", help="Also write the control: the whole update shrunk to the same size."),
    ] = None,
    recompress: Annotated[bool, typer.Option("--recompress", help="Cut every layer back to its rank.")] = False,
    k: K = 10,
    eps: Eps = 0.5,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Write an adapter with its intruder dimensions scaled. Compare it with the control before you trust it.

    Example:  studio inspect soften fox --base tinymoji --out soft.safetensors --control control.safetensors
    """
    from adapters.merging.accuracy import sums_of
    from studio import silence
    from studio.adapter_files.command import write
    from studio.inspection import intruders

    output = Output(json, quiet)
    silence.library_warnings()
    silence.loading_bars()
    with Terminal(quiet) as terminal:
        made, shrunk, found = intruders.soften(adapter, base, strength, k, eps, recompress, terminal)
    if strength > 1:
        output.note("A lambda above 1 amplifies intruders: the model forgets more.")
    for file, place in ((made, out), (shrunk, control)):
        if place is not None:
            write(file, place, "diffusers" if place.suffix == ".safetensors" else "peft", sums_of(file))
    output.result({"path": str(out), **found}, lambda: facts({"path": str(out), **found}.items()))


@group.command()
def forgetting(
    adapter: Adapter,
    base: Base,
    old: Annotated[
        str, typer.Option("--old", help="What the base knew: a folder of pictures, or a text file (language models).")
    ],
    new: Annotated[str, typer.Option("--new", help="What the adapter learnt, in the same form.")] = "",
    strengths: Annotated[
        list[float] | None, typer.Option("--lambda", help="Also measure at this factor; repeatable.")
    ] = None,
    k: K = 10,
    eps: Eps = 0.5,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Measure forgetting with intruders scaled, and with the whole update shrunk to the same size (the control).

    Example:  studio inspect forgetting fox --base tinymoji --old old-pictures/ --new new-pictures/
    """
    from studio import silence
    from studio.inspection import intruders

    output = Output(json, quiet)
    silence.library_warnings()
    silence.loading_bars()
    chosen = tuple(strengths or (1.0, 0.75, 0.5, 0.25, 0.0))
    with Terminal(quiet) as terminal:
        rows = intruders.forgetting(adapter, base, old, new, chosen, k, eps, terminal)
    values = [{"variant": r.variant, "factor": r.strength, "norm": r.norm, **r.losses} for r in rows]
    names = list(values[0])
    output.result(values, lambda: table(names, [[_cell(value[name]) for name in names] for value in values]))


@group.command()
def experts(
    adapter: Adapter,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Rows to look at, as for a training; repeatable. Empty: those of its training."),
    ] = None,
    by: Annotated[
        str, typer.Option("--by", help="Column whose values are the groups to compare; empty: one group per file.")
    ] = "",
    base: Annotated[str, typer.Option("--base", help="The base model; empty: the one that the adapter names.")] = "",
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows of each file to read.")] = 64,
    plot: Annotated[Path | None, typer.Option("--plot", help="Plot every router in this .png file.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show which expert of a mixture takes which tokens: per layer, and per group of rows.

    Example:  studio inspect experts several --data rows.jsonl --by task --plot routing.png
    """
    from studio import silence
    from studio.inspection import experts as routers

    output = Output(json, quiet)
    silence.library_warnings()
    silence.loading_bars()
    if plot is not None and plot.suffix.lower() != ".png":
        raise InputError(f"--plot: pictures are written as .png, got '{plot.suffix}'.")
    with Terminal(quiet) as terminal:
        report = routers.experts(adapter, data or (), base, by, rows, terminal)
    if plot is not None:
        from adapters import files

        drawn = routers.picture(report)
        files.write(plot, lambda part: drawn.save(part, format="PNG"))
        output.note(f"Plotted to {plot}")
    output.result(report.to_dict(), lambda: _routers(report))


def _routers(report: ExpertsReport) -> Any:
    """A row per router, and what each expert of the last one takes."""
    from rich.console import Group

    rows = [
        (router["module"] or "the whole model", *(_loads(router["groups"].get(group, ())) for group in report.groups),
         f"{router['busiest']:.1f}", str(router["unused"]), f"{router['entropy']:.2f}", f"{router['apart']:.2f}")
        for router in report.routers
    ]  # fmt: skip
    names = ["router", *(f"{group} (%)" for group in report.groups), "busiest", "unused", "entropy", "apart"]
    last = report.routers[-1]
    words = [(report.experts[n], " ".join(repr(word) for word in own)) for n, own in enumerate(last["words"])]
    return Group(table(names, rows), facts([(f"expert {name}", own or "nothing of its own") for name, own in words]))


def _loads(loads: Sequence[float]) -> str:
    return " ".join(f"{100 * load:.0f}" for load in loads)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shown(report: Report) -> Any:
    from rich.console import Group

    rows = [
        (layer.name, f"{layer.shape[0]} x {layer.shape[1]}", str(layer.rank), f"{layer.relative_change:.3f}",
         str(layer.intruders), " ".join(map(str, layer.positions)), f"{layer.captured:.0%}")
        for layer in report.layers
    ]  # fmt: skip
    total = {
        "intruders": f"{report.total} of {report.k * len(report.layers)}",
        **{f"in {kind}": str(count) for kind, count in report.by_kind().items() if count},
    }
    names = ["layer", "shape", "rank", "|dW|/|W0|", "intruders", "at", "share of dW"]
    return Group(table(names, rows), facts(total.items()))
