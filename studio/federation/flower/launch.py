"""Starts Flower's processes: the SuperLink with the server's program, or a SuperNode that waits for messages.

TLS and node authentication are on unless ``certificates`` is None. Processes are ended with SIGTERM and waited for:
after a SIGKILL, a SuperNode's own child stays behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adapters import files
from adapters.errors import InputError, MissingDependencyError, StudioError
from studio.federation.flower import certificates as secrets
from studio.federation.flower.certificates import AUTHORITY, KEY, SERVER
from studio.federation.schema import FederateConfig

CONNECTION = "federation"

OWNERS = "owners.json"
"""File with the node that belongs to each client's key; empty without keys."""

STILL_THERE = "[code: 2004]"
"""Flower's words when a key is turned away, also for a client that died and is back before this was noticed."""

TRIES, PAUSE = 12, 15.0
"""How often such a client tries again, and the seconds between."""

APP = """[project]
name = "adapter-studio-federation"
version = "1.0.0"
description = "Server and client of an Adapter Studio federation."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "adapter-studio"

[tool.flwr.app.components]
serverapp = "federation_app:server"
clientapp = "federation_app:client"

[tool.flwr.app.config]
config = ""
folder = ""
patience = 3600.0
"""
MODULE = "from studio.federation.flower.apps import client, server\n\n__all__ = [\"client\", \"server\"]\n"


def program(name: str) -> str:
    """Flower's program ``name``, of this environment; raises :class:`MissingDependencyError`."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise MissingDependencyError("flwr", "federated", "Federated training over a network")
    return found


def environment(home: Path) -> dict[str, str]:
    """The processes' environment: no telemetry, no look for updates, state in ``home``."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # Flower starts its others
    return {
        **os.environ, "PATH": path, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip


def serve(
    config: Path, folder: Path, host: str, port: int, certificates: Path | None, patience: float, resume: bool
) -> dict[str, Any]:
    """Run the server until the federation has ended; returns its result.

    Raises:
        InputError: a configuration without clients of their own, a port in use, certificates that are missing or for
            another host.
        StudioError: the federation failed; the sentence is the server's.
    """
    chosen = check_deployable(FederateConfig.from_yaml(config))
    folder = folder.resolve()
    if not resume:
        for old in ("server", "flower"):
            shutil.rmtree(folder / old, ignore_errors=True)
    check_free(host, port)
    if certificates is not None:
        check_certificates(certificates, host, [client.name for client in chosen.clients])
    home, app = folder / "flower", folder / "flower" / "app"
    files.write_text(app / "pyproject.toml", APP)
    files.write_text(app / "federation_app.py", MODULE)
    files.write_text(home / "config.toml", connection(host, port, certificates))
    (folder / "result.json").unlink(missing_ok=True)
    values = {"config": str(config.resolve()), "folder": str(folder), "patience": float(patience)}
    told = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
    with running(link(host, port, certificates), home, folder / "superlink.log") as superlink:
        wait_for(host, port, superlink, folder / "superlink.log")
        flower = program("flwr")
        owners: dict[str, int] = {}
        if certificates is not None:
            for client in chosen.clients:
                key, said = str((certificates / f"{client.name}.pub").resolve()), home / f"{client.name}.registered"
                said.unlink(missing_ok=True)
                _run([flower, "supernode", "register", key, CONNECTION, "--format", "json"], home, said)
                owners[client.name] = registered(said.read_text(encoding="utf-8"), client.name)
        files.write_text(home / OWNERS, json.dumps(owners))
        _run([flower, "run", str(app), CONNECTION, "--stream", "--run-config", told], home, folder / "flower.log")
    result = folder / "result.json"
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    if "adapter" not in found:
        raise StudioError(found.get("error") or f"The server ended without a result: see '{folder / 'flower.log'}'.")
    return found


def take_part(
    config: Path, name: str, folder: Path, address: str, certificates: Path | None, port: int, log: Path
) -> None:
    """Run a client until it is stopped.

    Raises:
        InputError: no such client, a port in use, or missing certificates.
        StudioError: the client was turned away, or ended by itself.
    """
    chosen = check_deployable(FederateConfig.from_yaml(config))
    if name not in [client.name for client in chosen.clients]:
        raise InputError(f"There is no client '{name}': {', '.join(client.name for client in chosen.clients)}.")
    check_free("127.0.0.1", port)
    home = folder.resolve() / "flower"
    home.mkdir(parents=True, exist_ok=True)
    node = f'config="{config.resolve()}" client="{name}" folder="{folder.resolve()}"'
    command = [
        program("flower-supernode"), "--superlink", address, "--host", "127.0.0.1", "--port", str(port),
        "--node-config", node,
    ]  # fmt: skip
    if certificates is None:
        command += ["--insecure"]
    else:
        for file in (AUTHORITY, f"{name}.key"):
            if not (certificates / file).is_file():
                raise InputError(f"'{certificates / file}' is missing: get it from the server's owner.")
        own = folder.resolve() / "runtime-certificates"
        secrets.make(own, ["127.0.0.1", "localhost"], [])
        command += [
            "--root-certificates", str((certificates / AUTHORITY).resolve()),
            "--auth-supernode-private-key", str((certificates / f"{name}.key").resolve()),
            "--ssl-ca-certfile", str(own / AUTHORITY), "--ssl-certfile", str(own / SERVER),
            "--ssl-keyfile", str(own / KEY),
        ]  # fmt: skip
    tries = 0
    while True:
        written = log.stat().st_size if log.is_file() else 0
        with running(command, home, log) as process:
            code = process.wait()
        if code in (0, -signal.SIGTERM, -signal.SIGINT):
            return
        said = log.read_bytes()[written:].decode("utf-8", errors="replace")
        if STILL_THERE not in said or tries == TRIES:
            raise StudioError(f"The client ended: {_reason(said)}")
        tries += 1
        time.sleep(PAUSE)


def link(host: str, port: int, certificates: Path | None) -> list[str]:
    """The command of the SuperLink."""
    command = [
        program("flower-superlink"), "--host", host, "--port", str(port), "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    if certificates is None:
        return [*command, "--insecure"]
    return [
        *command, "--ssl-ca-certfile", str((certificates / AUTHORITY).resolve()), "--ssl-certfile",
        str((certificates / SERVER).resolve()), "--ssl-keyfile", str((certificates / KEY).resolve()),
        "--enable-supernode-auth",
    ]  # fmt: skip


def registered(said: str, name: str) -> int:
    """The node that Flower made for a client's key, by the answer of its command.

    Raises:
        StudioError: the answer does not tell it.
    """
    found = re.search(r'"node-id":\s*"?(\d+)', said)
    if found is None:
        raise StudioError(f"Flower did not say which node the key of '{name}' has: {_reason(said) or 'it was silent'}")
    return int(found[1])


def connection(host: str, port: int, certificates: Path | None) -> str:
    """Flower's ``config.toml``: how its own command reaches the SuperLink."""
    reached = "127.0.0.1" if host == "0.0.0.0" else host
    lines = [f'[superlink]\ndefault = "{CONNECTION}"', "", f'[superlink.{CONNECTION}]\naddress = "{reached}:{port}"']
    if certificates is None:
        return "\n".join([*lines, "insecure = true", ""])
    return "\n".join([*lines, f'root-certificates = "{(certificates / AUTHORITY).resolve()}"', ""])


# ------------------------------------------------------------------------------------------------ checks


def check_deployable(config: FederateConfig) -> FederateConfig:
    """The configuration, unless it divides one file among simulated clients; raises :class:`InputError`."""
    if not config.clients:
        raise InputError("Over a network every client has its own data: name clients instead of one data file.")
    if config.public_data:
        raise InputError("public_data is for runs in one process: over a network fed-sb starts from its clients.")
    if config.secure_aggregation:
        raise InputError(
            "secure_aggregation is not built for deployments yet (Flower has it for its older interface only): switch "
            "it off."
        )
    return config


def check_certificates(folder: Path, host: str, clients: Sequence[str]) -> None:
    """Refuse missing certificates, and a server certificate for another host; raises :class:`InputError`."""
    wanted = [AUTHORITY, SERVER, KEY, *(f"{name}.pub" for name in clients)]
    missing = [file for file in wanted if not (folder / file).is_file()]
    if missing:
        raise InputError(
            f"'{folder / missing[0]}' is missing: make it with  studio federate certificates CONFIG --out {folder}"
        )
    hosts = secrets.hosts_of(folder / SERVER)
    if host != "0.0.0.0" and host not in hosts:
        raise InputError(f"The certificate is for {', '.join(hosts)}, not for '{host}': make one with --host {host}.")


def check_free(host: str, port: int) -> None:
    """Refuse a port in use; raises :class:`InputError`."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            raise InputError(f"Port {port} of {host} cannot be used ({error.strerror}): choose another one.") from None


# ------------------------------------------------------------------------------------------------ processes


@contextmanager
def running(command: Sequence[str], home: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with SIGTERM, and waited for, on exit."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment(home), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)  # ends like Ctrl-C, so that the processes end too
    try:
        yield process
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):  # what it started
            os.killpg(process.pid, signal.SIGTERM)


def wait_for(host: str, port: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 600.0) -> None:
    """Wait until the server ``process`` listens; raises :class:`StudioError` if it does not, or has ended."""
    reached = "127.0.0.1" if host == "0.0.0.0" else host
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StudioError(f"Flower's server ended at once: {_last_line(log)}")
        try:
            socket.create_connection((reached, port), 1).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise StudioError(f"Flower's server does not listen on {reached}:{port} after {seconds:g} seconds.")


def _run(command: Sequence[str], home: Path, log: Path | None = None) -> None:
    """Run one of Flower's commands to its end."""
    with running(command, home, log or home / "commands.log") as process:
        code = process.wait()
    if code:
        raise StudioError(f"'{' '.join(command[1:4])}' failed: {_last_line(log or home / 'commands.log')}")


def _last_line(log: Path) -> str:
    return _reason(log.read_text(encoding="utf-8", errors="replace")) or f"see '{log}'"


def _reason(said: str) -> str:
    """The line of a log that says most: one with Flower's code, else an error, else the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for mark in ("[code:", "Error", "ERROR", ""):
        found = [line for line in lines if mark in line]
        if found:
            return found[-1]
    return ""
