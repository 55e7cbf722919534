"""``studio generate``: a generator of adapters, and adapters from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from studio.cli.output import Json, Output, Quiet, facts, table
from studio.cli.schema_options import with_options
from studio.generation.schema import GenerateSampleConfig, GenerateTrainConfig
from studio.schema import JobConfig, read_yaml
from studio.training.commands import launch

group = typer.Typer(help="Learn a generator of adapters, and make the adapter of a task with it.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(group, name="generate")


@group.command()
@with_options(GenerateTrainConfig)
def train(
    fields: dict[str, Any],
    config: Annotated[Path | None, typer.Argument(help="Configuration file; flags change what it says.")] = None,
    detach: launch.Detach = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn a generator from snapshots of several tasks' adapters (ICM-LoRA).

    Example:  studio generate train --snapshots sums=runs/sums --snapshots dates=runs/dates --examples sums=sums.txt
    --examples dates=dates.txt --base smollm2
    """
    values = {**(read_yaml(config) if config else {}), **fields}
    result = _run(GenerateTrainConfig.parse(values, source=str(config or "generate train")), detach, json, quiet)
    if result is None:
        return
    Output(json, quiet).result(result, lambda: _shown(result))


@group.command()
@with_options(GenerateSampleConfig, skip=["generator"])
def sample(
    fields: dict[str, Any],
    generator: Annotated[str, typer.Argument(metavar="GENERATOR", help="The generator's .safetensors file.")],
    detach: launch.Detach = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the adapter of a task, by its name or from examples of it; it is added to the library.

    Example:  studio generate sample generator.safetensors --task sums --seed 1
    """
    config = GenerateSampleConfig.parse({"generator": generator, **fields}, source="generate sample")
    result = _run(config, detach, json, quiet)
    if result is None:
        return
    Output(json, quiet).result(result, lambda: facts({"in the library": ", ".join(result["library"])}.items()))


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


def _shown(result: dict[str, Any]) -> Any:
    from rich.console import Group

    rows = [(task, f"{own['error']:.3f}", f"{own['mean_error']:.3f}") for task, own in result["tasks"].items()]
    told = {
        "generator": result["generator"],
        "parameters": f"{result['parameters']:,}, {result['parameters'] / result['adapter_parameters']:.1f} times one "
        f"adapter, {result['parameters'] / result['adapter_parameters'] / result['snapshots']:.2f} times all snapshots",
        "MSE": f"{result['mse']:.4g}",
        "KL": f"{result['kl']:.4g}",
    }
    remarks = (f"Note: {remark}" for remark in result["remarks"])
    return Group(table(["task", "error", "error of the mean of all tasks"], rows), facts(told.items()), *remarks)
