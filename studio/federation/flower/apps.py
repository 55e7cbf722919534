"""The two programs that Flower runs: the server's, once, and the client's, once for every message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from adapters import files
from adapters.errors import InputError
from adapters.progress import Silent
from studio import error_sentences
from studio.federation import client as answering
from studio.federation import engine, export
from studio.federation.clients import Member, members
from studio.federation.flower import records
from studio.federation.flower.launch import OWNERS
from studio.federation.flower.strategy import RuleStrategy, start
from studio.federation.messages import Asked, Reply
from studio.federation.schema import FederateConfig
from studio.federation.server import Server

server = ServerApp()
client = ClientApp()

RESULT = "result.json"


@server.main()  # type: ignore[untyped-decorator, unused-ignore]
def serve(grid: Grid, context: Context) -> None:
    """Run the rounds; write the adapter and ``result.json`` (which holds an error's sentence if there is one)."""
    folder = Path(str(context.run_config["folder"]))
    try:
        config = FederateConfig.from_yaml(str(context.run_config["config"]))
        state = Server.load(config, [one.name for one in config.clients], folder)
        owners = json.loads((folder / "flower" / OWNERS).read_text(encoding="utf-8"))
        start(RuleStrategy(state, folder, float(context.run_config["patience"]), owners), grid)
        adapter = export.write(state, folder, engine.facts(state))
        found: dict[str, Any] = {
            "adapter": str(adapter), "rounds": state.done, "clients": len(state.names),
            "measures": engine.means(state.rounds[-1]), "bytes": engine.traffic(state),
        }  # fmt: skip
    except Exception as error:
        files.write_text(folder / RESULT, json.dumps({"error": error_sentences.sentence(error)}))
        raise
    files.write_text(folder / RESULT, json.dumps(found))


@client.query("who")  # type: ignore[untyped-decorator, unused-ignore]
def who(message: Message, context: Context) -> Message:
    """The client's name."""
    return Message(records.answered(Reply(str(context.node_config["client"]))), reply_to=message)


@client.query("start")  # type: ignore[untyped-decorator, unused-ignore]
def begin(message: Message, context: Context) -> Message:
    """How this client's training starts."""
    return _answer(message, context, "start")


@client.query("gradients")  # type: ignore[untyped-decorator, unused-ignore]
def gradients(message: Message, context: Context) -> Message:
    """This client's part of the first full step."""
    return _answer(message, context, "gradients")


@client.train()  # type: ignore[untyped-decorator, unused-ignore]
def train(message: Message, context: Context) -> Message:
    """A round."""
    return _answer(message, context, "train")


@client.evaluate()  # type: ignore[untyped-decorator, unused-ignore]
def evaluate(message: Message, context: Context) -> Message:
    """Measures on this client's test data."""
    return _answer(message, context, "evaluate")


def _answer(message: Message, context: Context, asked: Asked) -> Message:
    """Answer with the result, or with the sentence that says why there is none."""
    name = str(context.node_config["client"])
    try:
        config = FederateConfig.from_yaml(str(context.node_config["config"]))
        folder = Path(str(context.node_config["folder"]))
        folder.mkdir(parents=True, exist_ok=True)
        instruction, theirs = records.unpacked(message, asked)
        check_same(records.shared(config), theirs)
        reply = answering.answer(instruction, config, member_of(config, name, folder), folder, Silent())
    except Exception as error:
        return Message(records.refused(name, error_sentences.sentence(error)), reply_to=message)
    return Message(records.answered(reply), reply_to=message)


def member_of(config: FederateConfig, name: str, folder: Path) -> Member:
    """The client ``name`` of a configuration; raises :class:`InputError` if there is none."""
    found = [member for member in members(config, folder) if member.name == name]
    if not found:
        raise InputError(f"There is no client '{name}' in the configuration.")
    return found[0]


def check_same(own: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Refuse a federation whose server has other settings; raises :class:`InputError` naming them."""
    differing = [key for key in {**own, **theirs} if own.get(key) != theirs.get(key)]
    if differing:
        raise InputError(f"This client's configuration differs from the server's in {', '.join(differing)}.")
