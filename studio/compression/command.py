"""``studio compress``: make a smaller base; one command per method, generated from its job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from studio.cli.output import Json, Output, Quiet, size, table
from studio.cli.schema_options import with_options
from studio.compression import recover_command
from studio.jobs import kinds
from studio.schema import JobConfig
from studio.training.commands import launch

group = typer.Typer(help="Make a base smaller: fewer bits, fewer heads and channels.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group."""
    for name, kind in kinds.compressions().items():
        text = f"{kind.help}\n\nExample:  {kind.example}".replace("[", "\\[") if kind.example else kind.help
        group.command(name, help=text)(with_options(kind.model(), skip=["base", *fixed(kind)])(_command(kind)))
    group.command("recover")(recover_command.recover)
    app.add_typer(group, name="compress")


def fixed(kind: kinds.Kind) -> tuple[str, ...]:
    """Fields of the kind's configuration that have one possible value."""
    found: tuple[str, ...] = getattr(kind.model(), "fixed", ())
    return found


@group.command()
def backends(json: Json = False, quiet: Quiet = False) -> None:
    """Which ways of storing a base in few bits work here: each is tried on a small layer.

    Example:  studio compress backends
    """
    from dataclasses import asdict

    from adapters.compression.backends import probes
    from studio import silence

    silence.library_warnings()
    found = probes()
    rows = [
        (one.name, f"{one.package} {one.version}".strip(), "works" if one.works else one.reason,
         f"{one.bits:.2f}" if one.bits else "")
        for one in found
    ]  # fmt: skip
    Output(json, quiet).result(
        [asdict(one) for one in found], lambda: table(["quantization", "package", "here", "bits per weight"], rows)
    )


def _command(kind: kinds.Kind) -> Callable[..., None]:
    def compress(
        fields: dict[str, Any],
        base: Annotated[str, typer.Argument(help="Language model: name in the library, or directory.")],
        estimate: Annotated[
            bool, typer.Option("--estimate", help="Only say what it will need and give.", rich_help_panel="Output")
        ] = False,
        detach: launch.Detach = False,
        json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        from studio import jobs, silence

        silence.library_warnings()
        silence.loading_bars()
        output = Output(json, quiet)
        config = kind.model().parse({"base": base, **fields}, source=f"compress {kind.compress}")
        if estimate:
            _print_estimate(config, output)
            return
        if detach:
            launch.detach(kind.name, config, output)
            return
        job = launch.here(lambda terminal: jobs.run_here(kind.name, config, terminal), output)
        result = dict(job.result or {})
        output.result({"job": job.id, **result}, str(result.get("library") or result.get("adapter")))
        output.note(
            result.get("told")
            or f"'{result['library']}' is in the library: {size(result['bytes'])} instead of "
            f"{size(result['base_bytes'])}. Talk to it with  studio chat '{result['library']}'"
        )

    return compress


def _print_estimate(config: JobConfig, output: Output) -> None:
    """Print what the job will need and give."""
    from studio.compression.estimate import sentence

    kind = kinds.find(config.kind)
    kind.check(config)
    found = kind.foreseen(config)
    output.result(found.as_json(), sentence(found))
