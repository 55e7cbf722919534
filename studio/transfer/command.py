"""``studio transfer``: keep what a transfer needs while the data are there; move an adapter to another base later."""

from __future__ import annotations

import json as _json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from adapters.errors import InputError
from studio.cli.output import Json, Output, Quiet, facts, table
from studio.cli.schema_options import with_options
from studio.schema import JobConfig, read_yaml
from studio.training.commands import launch
from studio.transfer import bundle as bundles
from studio.transfer.schema import REPORT, PrepareTransferConfig, TransferConfig


class _RunIsMeant(TyperGroup):
    """A group where ``studio transfer BUNDLE --to BASE`` is ``studio transfer run BUNDLE --to BASE``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        named = bool(args) and args[0] in self.commands
        return super().resolve_command(ctx, args if named or "--to" not in args else ["run", *args])


group = typer.Typer(
    help="Move a language adapter to another base without its data (Trans-LoRA).", no_args_is_help=True, cls=_RunIsMeant
)

Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Configuration file; flags change what it says.",
                              rich_help_panel="Output")
]  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(group, name="transfer")


@group.command()
@with_options(PrepareTransferConfig, skip=["adapter"])
def prepare(
    fields: dict[str, Any],
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Language adapter: name in the library, file or PEFT folder.")
    ],
    config: Config = None,
    detach: launch.Detach = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a bundle of an adapter while its data are there: a few seeds and a filter, nothing else of the data.

    Example:  studio transfer prepare my-adapter --base smollm2 --data rows.jsonl --out my-bundle
    """
    values = {**(read_yaml(config) if config else {}), **fields, "adapter": adapter}
    result = _run(PrepareTransferConfig.parse(values, source=str(config or "transfer prepare")), detach, json, quiet)
    if result is None:
        return
    output = Output(json, quiet)
    output.result(result, lambda: facts(_prepared(result).items()))
    for remark in result["remarks"]:
        output.note(f"Note: {remark}")


@group.command("run")
@with_options(TransferConfig, skip=["bundle"])
def transfer(
    fields: dict[str, Any],
    bundle: Annotated[
        str, typer.Argument(metavar="BUNDLE", help="Folder of  studio transfer prepare, or the adapter it was made of.")
    ],
    config: Config = None,
    detach: launch.Detach = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Move the adapter of a bundle to another base; the new one is added to the library.

    Example:  studio transfer my-adapter --to my-other-base --name moved
    """
    values = {**(read_yaml(config) if config else {}), **fields, "bundle": _bundle(bundle)}
    result = _run(TransferConfig.parse(values, source=str(config or "transfer run")), detach, json, quiet)
    if result is None:
        return
    output = Output(json, quiet)
    output.result(result, lambda: _moved(result))
    for remark in result["remarks"]:
        output.note(f"Note: {remark}")


@group.command()
def report(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Id of a transfer, 'last', or its folder.")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What became of the written inputs, and how the new adapter answers.

    Example:  studio transfer report last
    """
    from studio import jobs

    place = Path(job).expanduser() if Path(job).expanduser().is_dir() else jobs.get(job).folder
    try:
        result = _json.loads((place / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"'{job}' has no report of a transfer: it is another job, or has not ended yet.") from None
    Output(json, quiet).result(result, lambda: _moved(result))


def _bundle(given: str) -> str:
    """The folder of a bundle: as given, or of the newest one made of the adapter with that name."""
    from studio import jobs

    if (Path(given).expanduser() / bundles.MANIFEST).is_file():
        return given
    for job in jobs.list(1000, ["done"], PrepareTransferConfig.kind):
        place = str((job.result or {}).get("bundle", ""))
        if job.config.get("adapter") == given and (Path(place) / bundles.MANIFEST).is_file():
            return place
    return given


def _run(config: JobConfig, detach: bool, json: bool, quiet: bool) -> dict[str, Any] | None:
    """The result of the job, or None if it was queued."""
    from studio import jobs, silence

    output = Output(json, quiet)
    silence.library_warnings()
    if detach:
        launch.detach(config.kind, config, output)
        return None
    silence.loading_bars()
    done = launch.here(lambda terminal: jobs.run_here(config.kind, config, terminal), output)
    return {"job": done.id, **(done.result or {})}


def _prepared(result: dict[str, Any]) -> dict[str, Any]:
    found = result["discriminator"]
    told = {"bundle": result["bundle"], "rows": result["rows"], "seeds": result["seeds"]}
    if not found:
        return {**told, "discriminator": "none"}
    return {
        **told,
        "real inputs accepted": f"{found['accepted']} of {found['real']}",
        "written inputs rejected": f"{found['rejected']} of {found['written']}",
        "accuracy on held-out inputs": f"{found['accuracy']:.3f} (by chance with p = {found['p_chance']:.2g})",
    }


def _moved(result: dict[str, Any]) -> Any:
    from rich.console import Group

    counts = [(name, str(count)) for name, count in sorted(result["outcomes"].items(), key=lambda one: -one[1])]
    told = {
        "adapter": result["adapter"],
        "in the library": result.get("library", result.get("library_problem", "")),
        "examples": result["examples"],
        "acceptance": f"{result['kept']} of {result['drawn']} ({result['acceptance']:.1%})",
        "different words, pairs": f"{result['distinct_1']:.2f}, {result['distinct_2']:.2f}",
        "loss": f"{result['loss']:.4f}",
    }
    parts: list[Any] = [table(["written inputs", "count"], counts), facts(told.items())]
    if test := result["test"]:
        rows = [(name, f"{share:.3f}") for name, share in test.items() if name != "rows"]
        parts.append(table([f"exact answers to {test['rows']} test rows", "share"], rows))
    return Group(*parts)
