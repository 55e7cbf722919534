"""``studio federate``: an adapter trained on the data of several clients that stay with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.errors import InputError
from studio.cli.output import Json, Output, Quiet, table
from studio.cli.output import size as shown_size
from studio.cli.schema_options import with_options
from studio.federation.schema import FederateConfig
from studio.schema import read_yaml
from studio.training.commands import launch

group = typer.Typer(no_args_is_help=True)

Config = Annotated[
    Path | None,
    typer.Argument(help="Configuration file; flags change what it says. See examples/configs/federate.yaml."),
]


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(group, name="federate")


@group.command()
@with_options(FederateConfig)
def simulate(
    fields: dict[str, Any],
    config: Config = None,
    detach: launch.Detach = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run server and clients in one process, as a job: watched, stopped and resumed like any other.

    In every round each client trains the shared adapter on its own data and sends only what was trained; the server
    combines that and sends the result back.

    Example:  studio federate simulate federation.yaml --method fed-sb --rounds 10

    The file says who has what, and how each client trains:

        method: fed-sb
        rounds: 10
        train: language
        training: {base: smollm2, rank: 32, steps: 20}
        clients:
          - {name: north, data: north.jsonl, test: north-test.jsonl}
          - {name: south, data: south.jsonl, test: south-test.jsonl}

    or one file of rows is divided among simulated clients: data, count, partition, by.
    """
    from studio import silence

    output = Output(json, quiet)
    silence.library_warnings()
    chosen = read(config, fields)
    if detach:
        launch.detach("federate", chosen, output)
        return
    from studio import jobs

    silence.loading_bars()
    job = launch.here(lambda terminal: jobs.run_here("federate", chosen, terminal), output)
    output.result({"job": job.id, **(job.result or {})}, lambda: summary(job.result or {}))


@group.command()
@with_options(FederateConfig)
def show(fields: dict[str, Any], config: Config = None, json: Json = False) -> None:
    """Who has what: how many rows every client has, of which label, and what each method would send.

    Example:  studio federate show federation.yaml
    """
    from studio.federation.partition_table import parts

    found = parts(read(config, fields))
    Output(json).result(
        [part.__dict__ for part in found],
        lambda: table(
            ["client", "to train on", "to measure on", "labels"],
            [[part.name, part.rows, part.tested, part.text()] for part in found],
        ),
    )


Needed = Annotated[Path, typer.Argument(help="Configuration file, with a clients entry for every client.")]
Folder = Annotated[Path, typer.Option("--folder", help="Where this side keeps its state and results.")]
Certificates = Annotated[
    Path | None, typer.Option("--certificates", help="Folder made by  studio federate certificates.")
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Without TLS and without keys: only to try it out.")]


@group.command()
def certificates(
    config: Needed,
    out: Annotated[Path, typer.Option("--out", help="Folder for certificates and keys.")],
    host: Annotated[
        list[str] | None, typer.Option("--host", help="Name or address at which clients reach the server; repeatable.")
    ] = None,
    json: Json = False,
) -> None:
    """Make the server's certificate and a key for every client of the configuration.

    Example:  studio federate certificates federation.yaml --out secrets --host server.example.org

    Give authority.crt and NAME.key to the client NAME, over a way you trust; keep the other files on the server.
    """
    from studio.federation.flower import certificates as making

    chosen = FederateConfig.from_yaml(config)
    made = making.make(out, host or ["127.0.0.1", "localhost"], [client.name for client in chosen.clients])
    Output(json).result(
        [str(file) for file in made], "\n".join(map(str, made)) or "All certificates and keys are there already."
    )


@group.command()
def server(
    config: Needed,
    folder: Folder,
    certificates: Certificates = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 = all.")] = "0.0.0.0",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 9092,
    patience: Annotated[
        float, typer.Option("--patience", min=1, help="Seconds to wait for clients and for their answers.")
    ] = 3600.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last round in --folder.")] = False,
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """Run the server of a federation over a network, with TLS and a key for every client.

    Example:  studio federate server federation.yaml --folder run --certificates secrets

    It needs no data and no model. Clients that stop are named and left out of the round; they may come back. Install
    it beside the app, in an environment of its own:  pip install 'adapter-studio[federated]'
    """
    from studio.federation.flower import launch as flower

    found = flower.serve(config, folder, host, port, _secrets(certificates, insecure), patience, resume)
    Output(json).result(found, lambda: summary(found))


@group.command()
def client(
    name: Annotated[str, typer.Argument(help="Name of this client in the configuration.")],
    config: Annotated[Path, typer.Argument(help="The same configuration file; only this client's data are needed.")],
    folder: Folder,
    address: Annotated[str, typer.Option("--server", help="Address of the server, HOST:PORT.")],
    certificates: Certificates = None,
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Port of this client's own processes, on this machine.")
    ] = 9094,
    insecure: Insecure = False,
) -> None:
    """Take part in a federation: train on this machine's data when the server asks, until it is stopped.

    Example:  studio federate client north federation.yaml --folder north --server server:9092 --certificates secrets
    """
    from studio.federation.flower import launch as flower

    log = folder / "client.log"
    Output().note(f"Waiting for the server at {address}; the log is {log}. Stop with Ctrl-C.")
    flower.take_part(config, name, folder, address, _secrets(certificates, insecure), port, log)


def _secrets(certificates: Path | None, insecure: bool) -> Path | None:
    if (certificates is None) != insecure:
        raise InputError("Name the folder of certificates with --certificates, or say --insecure to do without.")
    return certificates


def read(config: Path | None, fields: dict[str, Any]) -> FederateConfig:
    """The configuration: the file's values, overridden by the flags; relative data paths are the file's."""
    values = read_yaml(config) if config else {}
    if config:
        values = at_home(values, config.resolve().parent)
    values |= fields
    if not values:
        raise InputError("Name a configuration file, or clients with --clients '{name: a, data: a.jsonl}'.")
    return FederateConfig.parse(values, source=str(config or "the flags"))


def at_home(values: dict[str, Any], home: Path) -> dict[str, Any]:
    """``values`` with paths of data that exist beside the configuration file made absolute."""

    def absolute(path: Any) -> Any:
        if isinstance(path, str) and path and not Path(path).expanduser().exists() and (home / path).exists():
            return str(home / path)
        return path

    made = dict(values)
    for key in ("data", "public_data"):
        if key in made:
            made[key] = absolute(made[key])
    if isinstance(made.get("clients"), list):
        made["clients"] = [_own_paths(client, absolute) for client in made["clients"]]
    return made


def _own_paths(client: Any, absolute: Callable[[Any], Any]) -> Any:
    if not isinstance(client, dict):
        return client
    return {key: absolute(value) if key in ("data", "test") else value for key, value in client.items()}


def summary(result: dict[str, Any]) -> str:
    """A federation's result, line by line."""
    measures = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in result.get("measures", {}).items())
    sent = result.get("bytes", {})
    lines = [
        f"adapter: {result.get('adapter')}",
        *([f"library: {result['library']}"] if "library" in result else []),
        *([f"not in the library: {result['library_problem']}"] if "library_problem" in result else []),
        f"rounds: {result.get('rounds')} with {result.get('clients')} clients",
        *([f"measured on the clients' test data: {measures}"] if measures else []),
        f"sent by clients: {shown_size(sent.get('up', 0))}, to clients: {shown_size(sent.get('down', 0))}, "
        f"once: {shown_size(sent.get('once', 0))}",
        *([f"epsilon: {result['epsilon']:.3g}"] if "epsilon" in result else []),
    ]
    return "\n".join(lines)
