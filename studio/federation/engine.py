"""The job ``federate``: all clients of a federation in one process, one after another.

The server and every client are those of a deployment; only the messages do not leave the process. After every round the
state is written, and within a round every answer, so that a stopped run goes on where it was and ends with the same
adapter.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from adapters import files
from adapters.errors import Cancelled
from adapters.progress import Changed, Monitor, Progress, Silent
from adapters.progress import check as check_stop
from studio import error_sentences
from studio.federation import client, messages
from studio.federation.clients import Member, members, refuse_secure_aggregation
from studio.federation.history import HISTORY, WORTH, read_history
from studio.federation.messages import Instruction, Reply
from studio.federation.schema import FederateConfig
from studio.federation.server import Round, Server
from studio.jobs import kinds

Answer = Callable[[Member, Instruction], Reply]

def run(config: FederateConfig, folder: Path, monitor: Monitor = Silent(), resume: bool = False) -> dict[str, Any]:
    """Train the adapter that ``config`` describes in ``folder``.

    Args:
        folder: gets ``NAME/`` or ``NAME.safetensors`` (the adapter), ``card.md``, ``rounds.jsonl``, ``server/`` and
            ``clients/``.
        resume: go on after the last round in ``folder``.

    Returns:
        ``adapter`` (path), ``rounds``, ``clients``, ``measures`` (means of the shared adapter at the end), ``bytes``
        (sent ``up``, ``down`` in all rounds, and ``once``), ``epsilon`` (largest of the clients; only with privacy),
        ``history`` (path of ``rounds.jsonl``).

    Raises:
        InputError: something that cannot be trained, in one sentence.
        StudioError: too few clients answered.
        Cancelled: stopped on request.
    """
    refuse_secure_aggregation(config)
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        for old in ("server", "clients", "answers", "data"):
            shutil.rmtree(folder / old, ignore_errors=True)
    everyone = members(config, folder)
    server = Server.load(config, [member.name for member in everyone], folder)
    here = InProcess(config, folder, monitor)
    if not server.started:
        begin(server, everyone, here)
        server.save(folder)
    while server.done < config.rounds:
        check_stop(monitor)
        record = one_round(server, everyone, here, folder)
        due = config.evaluate_every and record.number % config.evaluate_every == 0
        if due or record.number == config.rounds:
            measure(server, everyone, here)
        server.save(folder)
        shutil.rmtree(folder / "answers", ignore_errors=True)
        write_history(server, folder)
        monitor.report(Progress(
            "round", record.number, config.rounds, metrics=told(record), message=sentence(record)
        ))  # fmt: skip
    return export(server, everyone[0], folder, monitor)


class InProcess:
    """Clients that answer in this process, each in a folder of its own.

    Attributes:
        failed: client -> why it did not answer in this round.
    """

    def __init__(self, config: FederateConfig, folder: Path, monitor: Monitor) -> None:
        self.config, self.folder, self.monitor = config, folder, monitor
        self.failed: dict[str, str] = {}

    def __call__(self, member: Member, message: Instruction) -> Reply:
        place = self.folder / "clients" / member.name
        place.mkdir(parents=True, exist_ok=True)

        def named(progress: Progress) -> Progress:
            number = f"round {message.round}, " if message.round else ""
            stage = f"{number}{member.name}: {progress.stage}"
            return replace(progress, stage=stage, message="", loss=None, metrics={})

        return client.answer(message, self.config, member, place, Changed(self.monitor, named))


def begin(server: Server, everyone: list[Member], answer: Answer) -> None:
    """Ask the first client how its training starts, and for Fed-SB all of them for the first full step."""
    first = answer(everyone[0], server.instruction(everyone[0].name, "start"))
    gradients = []
    if server.facts.trains == "R":
        public = server.config.public_data
        asked = [replace(everyone[0], name="public data", data=public)] if public else everyone
        gradients = [answer(member, server.instruction(member.name, "gradients")) for member in asked]
    server.begin(first, gradients)


def one_round(server: Server, everyone: list[Member], answer: InProcess, folder: Path) -> Round:
    """Send, train, receive and combine; answers of an interrupted round are read from ``folder/answers``."""
    began, number, down, replies = time.perf_counter(), server.done + 1, 0, []
    failed: dict[str, str] = {}
    for member in everyone:
        check_stop(answer.monitor)
        message = server.instruction(member.name, "train")
        down += messages.size(message.flat())
        file = folder / "answers" / f"{number:04d}-{member.name}.safetensors"
        try:
            replies.append(_kept(file, member) or _keep(file, answer(member, message)))
        except Cancelled:
            raise Cancelled(f"Stopped in round {number} of {server.config.rounds}; the run can be resumed.") from None
        except Exception as error:
            failed[member.name] = error_sentences.sentence(error)
    record = server.take(replies, failed, down)
    record.seconds = round(time.perf_counter() - began, 3)
    return record


def _keep(file: Path, reply: Reply) -> Reply:
    with files.whole(file, sync=False) as part:
        tensors = {name: value.contiguous() for name, value in reply.flat().items()}
        save_file(tensors, part, {"facts": json.dumps(dict(reply.facts))})
    return reply


def _kept(file: Path, member: Member) -> Reply | None:
    if not file.is_file():
        return None
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["facts"])
    return messages.reply(member.name, load_file(file), facts)


def measure(server: Server, everyone: list[Member], answer: Answer) -> None:
    """Measure the shared adapter on every client's test data; the record of the last round holds it."""
    for member in everyone:
        if not member.test:
            continue
        try:
            reply = answer(member, server.instruction(member.name, "evaluate"))
        except Cancelled:
            raise
        except Exception as error:
            server.rounds[-1].failed.setdefault(member.name, f"measuring: {error_sentences.sentence(error)}")
            continue
        server.rounds[-1].measured[member.name] = dict(reply.facts["measures"])


# ------------------------------------------------------------------------------------------------ results


def export(server: Server, member: Member, folder: Path, monitor: Monitor) -> dict[str, Any]:
    """Write the shared adapter as an ordinary LoRA, with the federation in its recipe.

    Args:
        member: a client, whose training's form and base the adapter takes.
    """
    config, record = server.config, server.rounds[-1]
    monitor.report(Progress("saving"))
    memory = client.Memory(dict(server.fixed))
    for layers in server.residuals:
        for name, product in layers.items():
            memory.residual[name] = client.added(memory.residual.get(name), product)
    message = Instruction("evaluate", server.done, server.tensors)
    learnt = client.begin(server.method, memory, message, config.seed, recipe=facts(server))
    training = member.config(config.seed, name=config.name)
    place = folder / "export"  # apart from the job's own files, some of which have the same names
    result = kinds.find(training.kind).function()(training, place, monitor, plugins=[learnt], keep="start")
    adapter, card = (_moved(Path(result[key]), folder) for key in ("adapter", "card"))
    shutil.rmtree(place)
    if not (folder / "config.yaml").is_file():
        files.write_text(folder / "config.yaml", config.to_yaml())
    monitor.report(Progress("round", server.done, config.rounds))
    epsilon = {"epsilon": max(record.epsilon.values())} if record.epsilon else {}
    return {
        "adapter": str(adapter), "card": str(card), "rounds": server.done, "clients": len(server.names),
        "measures": means(record), "bytes": traffic(server), **epsilon, "history": str(folder / HISTORY),
        "parameters": result["parameters"],
    }  # fmt: skip


def _moved(file: Path, folder: Path) -> Path:
    """A file or folder, moved into ``folder``."""
    target = folder / file.name
    if target.is_dir():
        shutil.rmtree(target)
    return file.replace(target)


def facts(server: Server) -> dict[str, Any]:
    """The recipe's entry on the federation; clients are counted, not named."""
    config, record = server.config, server.rounds[-1]
    found: dict[str, Any] = {
        "method": config.method, "rounds": server.done, "clients": len(server.names), "weights": config.weights,
        "measures": means(record), "bytes": traffic(server),
    }  # fmt: skip
    if config.method == "lora-fair":
        found |= {"correction": config.correction, "strength": config.strength}
    if server.fixed:
        from adapters.federated.state import digest

        found["frozen"] = digest(server.fixed)
    if config.privacy == "sample":
        found["privacy"] = {
            "unit": "one example of a client's data", "epsilon": max(record.epsilon.values(), default=0.0),
            "delta": config.delta, "clip": config.clip, "accountant": "PRV",
        }  # fmt: skip
    return found


def traffic(server: Server) -> dict[str, int]:
    """Bytes of tensors that all clients sent and received in the rounds, and before them."""
    start = server.rounds[0]
    frozen = messages.size(server.fixed)
    received = sum(1 for has, _ in server.known.values() if has)
    rounds = server.rounds[1:]
    return {
        "up": sum(record.up for record in rounds),
        "down": sum(record.down for record in rounds) - frozen * received,
        "once": start.up + frozen * received,
    }


def means(record: Round) -> dict[str, float]:
    """Means of the shared adapter's measures over the clients."""
    names = {name for values in record.measured.values() for name in values}
    return {name: value for name in sorted(names) if (value := record.mean(name)) is not None}


def told(record: Round) -> dict[str, float]:
    """A round as numbers, for progress."""
    found = means(record)
    losses = [values["loss"] for values in record.clients.values() if "loss" in values]
    if losses:
        found["client_loss"] = sum(losses) / len(losses)
    bias = record.layer_mean("bias")
    if bias is not None:
        found["bias"] = bias
    if record.epsilon:
        found["epsilon"] = max(record.epsilon.values())
    return found | {"bytes_up": float(record.up), "bytes_down": float(record.down)}


def sentence(record: Round) -> str:
    """A round in words."""
    parts = [f"{len(record.clients)} clients"]
    values = means(record)
    parts += [f"{name.replace('_', ' ')} {values[name]:.4g}" for name in WORTH if name in values][:1]
    bias = record.layer_mean("bias")
    if bias is not None:
        parts.append(f"relative bias {bias:.3g}")
    if record.epsilon:
        parts.append(f"epsilon {max(record.epsilon.values()):.3g}")
    parts.append(f"{record.up / 1e6:.3g} MB up, {record.down / 1e6:.3g} MB down")
    parts += [f"without {name}: {why}" for name, why in record.failed.items()]
    return f"round {record.number}: {'; '.join(parts)}"


def write_history(server: Server, folder: Path) -> None:
    """Write ``rounds.jsonl``."""
    lines = [json.dumps(record.as_json()) for record in server.rounds]
    files.write_text(folder / HISTORY, "\n".join(lines) + "\n")


__all__ = ["InProcess", "read_history", "run"]
