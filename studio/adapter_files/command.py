"""``studio lora``: inspect, convert, merge and extract adapter files of any program."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.errors import InputError
from adapters.formats.format import find, writable
from studio import silence
from studio.cli.output import Json, Output, Quiet, facts, size, table
from studio.cli.schema_options import pair
from studio.cli.terminal import Terminal
from studio.composition import lora_option

if TYPE_CHECKING:
    from adapters.formats import LoraFile
    from adapters.merging.accuracy import Accuracy, Sums

FORMATS = writable()

Adapter = Annotated[str, typer.Argument(help="Name in the library, file or PEFT folder.")]
Format = Annotated[str, typer.Option("--to", metavar="|".join(FORMATS), help="Format of the new file.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The new file; a folder for peft.")]
Base = Annotated[
    str | None, typer.Option("--base", help="Base model that resolves module names (kohya files need it).")
]

group = typer.Typer(help="Adapter files: inspect, convert, merge, extract.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(group, name="lora")


@group.command()
def inspect(
    adapter: Adapter,
    base: Annotated[str | None, typer.Option("--base", help="Base model to count the share of layers of.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read a whole file: layers, ranks, size of the change, whether every number is finite.

    Example:  studio lora inspect fox --base tinymoji
    """
    from studio import library
    from studio.library import scan

    path = library.resolve_adapter(adapter)
    file = _read(path)
    record = scan.record(path, "adapter")
    values = {
        "path": str(path),
        "format": file.format,
        "family": record.family,
        "layers": file.counts(),
        **({"changes": _changes(file, base)} if base else {}),
        "ranks": list(file.ranks()),
        "targets": list(file.targets()),
        "parameters": file.parameters(),
        "size": record.size,
        "dora": file.is_dora(),
        "strongest": _strongest(file),
        "triggers": list(record.triggers),
        "sha256": library.sha256(path),
        "metadata": {key: text if len(text) < 200 else text[:200] + " ..." for key, text in file.metadata.items()},
        "recipe": record.recipe,
    }
    shown = {
        **values,
        "size": size(record.size),
        "metadata": list(file.metadata),
        "recipe": "yes" if record.recipe else "",
    }
    Output(json, quiet).result(values, lambda: facts(shown.items()))


@group.command()
def convert(
    adapter: Adapter,
    out: Out,
    to: Format = "diffusers",
    base: Base = None,
    gates: Annotated[
        str,
        typer.Option(
            "--gates",
            metavar="EXPERT=GATE,...",
            help="For an X-LoRA: constant gates of its experts, with which it is one ordinary LoRA.",
        ),
    ] = "",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter in another format; the change it makes stays the same (the file is read back to check).

    Example:  studio lora convert fox --out fox-peft --to peft
    """
    from studio import library

    path = library.resolve_adapter(adapter)
    from adapters.merging.accuracy import sums_of

    file = _named([_constant(path, gates) if gates else _read(path)], base, to)[0]
    written, accuracy = write(file, out, to, sums_of(file))
    Output(json, quiet).result(
        {"path": str(written), "format": to, **_measured(accuracy)}, f"Written to {written} ({accuracy})"
    )


@group.command()
def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER[:WEIGHT]...", help="Adapters with their strengths.")
    ],
    out: Out,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Cut to this rank; default: no cut (the sum of all ranks).")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="See  studio methods --stage merging;  concatenate is the exact sum.")
    ] = "concatenate",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Method option such as mu=1; repeatable.")
    ] = None,
    to: Format = "diffusers",
    base: Base = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Write several adapters as one ordinary LoRA.

    Example:  studio lora merge fox:0.8 robot:0.6 --out both.safetensors
    """
    from adapters.merging.concatenate import summands
    from studio import library
    from studio.adapter_files import merging

    uses = [lora_option.parse(text) for text in adapters]
    if any("schedule" in use for use in uses):
        raise InputError("A LoRA file has no steps: leave out the @start-end ranges, or use studio compose.")
    files = _named([_read(library.resolve_adapter(use["path"])) for use in uses], base, to)
    weights = [float(use.get("weight", 1.0)) for use in uses]
    merged = merging.merge(method, files, weights, rank, dict(pair("--set", text) for text in set_ or []))
    written, accuracy = write(merged.file, out, to, summands(files, weights), exact=not merged.errors)
    values = {
        "path": str(written), "format": to, "method": method, "ranks": list(merged.file.ranks()), **_measured(accuracy),
    }  # fmt: skip
    output = Output(json, quiet)
    if method == "lego" and accuracy.error > 1:
        output.note(
            "In some layers the result is farther from the adapters' sum than zero is: ranks that cancel each other "
            "(in adapters started by pissa, olora, corda or lora_ga) do not cluster. Cut each adapter first: "
            "studio lora merge ONE --method svd --rank R."
        )
    output.result(values, f"Written to {written} (rank {max(merged.file.ranks())}; {accuracy})")


@group.command()
def extract(
    base: Annotated[str, typer.Argument(help="The model before: name in the library, hub id, folder or file.")],
    tuned: Annotated[str, typer.Argument(help="The model after fine-tuning, of the same family.")],
    out: Out,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Largest rank of a layer.")] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="Share of every layer's change to keep, in (0, 1].")
    ] = None,
    to: Format = "diffusers",
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Write what fine-tuning changed as a LoRA: the nearest one of that rank, with each layer's error.

    Example:  studio lora extract base.safetensors tuned.safetensors --out change.safetensors --rank 16
    """
    from adapters.merging.accuracy import sums_of
    from adapters.merging.extract import extract as difference
    from studio.adapter_files.fit_to_base import models

    output = Output(json, quiet)
    silence.library_warnings()
    find(to)
    with Terminal(quiet) as terminal:
        made = difference(models(base)[0], models(tuned)[0], rank, energy, terminal)
    written, _ = write(made.file, out, to, sums_of(made.file))
    place, worst = made.worst
    values = {
        "path": str(written), "format": to, "layers": made.file.counts(), "ranks": list(made.file.ranks()),
        "errors": made.errors, "left_out": made.left_out,
    }  # fmt: skip
    rows = sorted(made.errors.items(), key=lambda item: -item[1])
    output.result(values, lambda: table(["layer", "error"], [(name, f"{error:.4f}") for name, error in rows]))
    output.note(f"Written to {written}; largest relative error {worst:.3g} at {place}.")
    if made.left_out:
        output.note(f"{len(made.left_out)} parameters differ that a LoRA cannot hold (norms, biases, embeddings).")


def _changes(file: LoraFile, base: str) -> dict[str, str]:
    from studio.adapter_files.fit_to_base import changes

    silence.library_warnings()
    return changes(file, base)


def _read(path: Path) -> LoraFile:
    from adapters import formats

    return formats.read(path)


def _constant(path: Path, gates: str) -> LoraFile:
    """An X-LoRA with constant gates, "law=0.7,code=0.3".

    Raises:
        InputError: they are not written so, or do not fit the X-LoRA.
    """
    from adapters.layers.experts.files import with_gates

    given: dict[str, float] = {}
    for part in gates.split(","):
        name, _, value = part.strip().rpartition("=")
        try:
            given[name] = float(value)
        except ValueError:
            name = ""
        if not name or not math.isfinite(given[name]):
            raise InputError(f"gates are written EXPERT=GATE,..., as in law=0.7,code=0.3, not '{part.strip()}'.")
    return with_gates(path, given)


def _named(files: list[LoraFile], base: str | None, to: str) -> list[LoraFile]:
    """The files with the module names of one model.

    Raises:
        InputError: the names cannot be resolved without a base model, or the format is unknown.
    """
    find(to)
    if base is None:
        flat = [file.flat for file in files]
        if any(flat) and (find(to).dotted or not all(flat)):
            raise InputError("kohya files write module names without dots: say with --base which model they belong to.")
        return files
    from studio.adapter_files.fit_to_base import fitted

    return fitted(files, base)


def write(file: LoraFile, out: Path, to: str, sums: Sums, exact: bool = True) -> tuple[Path, Accuracy]:
    """Write to ``out`` in the format ``to``, read it back and compare it with ``sums``.

    Raises:
        InputError: the suffix of another format, or the file does not contain the adapters.
    """
    from adapters.merging.accuracy import write_checked

    ending = find(to).suffix
    if ending and out.suffix != ending:
        raise InputError(f"--out: the file must end in {ending}, got '{out.name}'.")
    out.parent.mkdir(parents=True, exist_ok=True)
    return write_checked(file, out, to, sums, exact)


def _measured(accuracy: Accuracy) -> dict[str, Any]:
    return {"layers": accuracy.layers, "largest_error": accuracy.error, "largest_error_at": accuracy.at}


def _strongest(file: LoraFile, number: int = 3) -> list[dict[str, Any]]:
    """The layers with the largest change, by Frobenius norm of s B A."""
    import torch

    norms = [
        {"layer": f"{component}.{module}", "norm": round(float(torch.linalg.vector_norm(layer.delta())), 4)}
        for component, module, layer in file.layers()
    ]
    return sorted(norms, key=lambda entry: -float(str(entry["norm"])))[:number]
