"""The federation's server as a Flower strategy: what is sent, and made of replies, is that of the server."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from adapters.errors import StudioError
from studio.federation import engine
from studio.federation.flower import records
from studio.federation.messages import Asked, Reply, size
from studio.federation.server import Server

WAIT = 2.0
"""Seconds between looks for clients."""

ASK = 300.0
"""Seconds for a newcomer to say its name; its process must start first."""

GRACE = 60.0
"""Seconds that a round waits for a client which was lost in the round before, and may be on its way back."""


class RuleStrategy(Strategy):  # type: ignore[misc, unused-ignore]  # Any without flwr
    """Combines by the server's rule, and saves the state after every round.

    Args:
        folder: gets ``server/`` and ``rounds.jsonl``.
        patience: seconds to wait for enough clients, and for their answers.
        owners: client -> the node of its key; without keys a name is that of the first node that says it, for as long
            as this node is connected.
    """

    def __init__(
        self, server: Server, folder: Path, patience: float = 3600.0, owners: Mapping[str, int] | None = None
    ) -> None:
        self.server, self.folder, self.patience, self.owners = server, folder, patience, owners or {}
        self.nodes: dict[int, str] = {}
        self.refused: dict[int, str] = {}
        self.sent: dict[int, int] = {}
        self.began = 0.0

    # ---------------------------------------------------------------- who is there
    def connected(self, grid: Grid) -> dict[int, str]:
        """Node -> client, of those connected now; newcomers are asked for their name.

        Raises:
            StudioError: fewer than needed within the time.
        """
        deadline, grace = time.monotonic() + self.patience, time.monotonic() + GRACE
        lost = self._lost()
        while True:
            present = [int(node) for node in grid.get_node_ids()]
            unknown = [node for node in present if node not in self.nodes]
            if unknown:
                asked = [self._message(node, "start", "query.who") for node in unknown]
                for answer in grid.send_and_receive(asked, timeout=min(ASK, self.patience)):
                    try:
                        self._admit(answer.metadata.src_node_id, records.reply_of(answer).client, present)
                    except records.ClientError:
                        continue
            found = {node: self.nodes[node] for node in present if self.nodes.get(node) in self.server.names}
            enough = len(self.server.names) if not self.server.started else self.server.needed
            back = lost <= set(found.values()) or time.monotonic() > grace
            if len(set(found.values())) >= enough and back:
                return found
            if time.monotonic() > deadline:
                there = ", ".join(sorted(found.values())) or "nobody"
                refused = "".join(f" {why}" for why in self.refused.values())
                raise StudioError(f"{enough} clients are needed, but there is only: {there}.{refused}")
            time.sleep(WAIT)

    def _admit(self, node: int, name: str, present: Sequence[int]) -> None:
        """Give a newcomer the name it says, unless the name is another node's; then it is told once in the log."""
        first = next((other for other in present if self.nodes.get(other) == name), node)
        if self.owners.get(name, first) == node:
            self.nodes[node] = name
            self.refused.pop(node, None)
        elif node not in self.refused:
            whose = "whose key it does not have" if name in self.owners else "as which another node takes part already"
            self.refused[node] = f"Node {node} was refused: it says it is '{name}', {whose}."
            print(self.refused[node], flush=True)

    def _lost(self) -> set[str]:
        """Clients that took part in the round before the last one, but not in the last."""
        if len(self.server.rounds) < 2:
            return set()
        before, last = self.server.rounds[-2:]
        took_part = set(before.clients) or set(self.server.names)
        return took_part - set(last.clients)

    def ask(self, grid: Grid, node: int, asked: Asked) -> Reply:
        """One question to one client, outside the rounds."""
        (answer,) = grid.send_and_receive([self._message(node, asked, f"query.{asked}")], timeout=self.patience)
        return records.reply_of(answer)

    def begin(self, grid: Grid) -> None:
        """Ask the first client how its training starts, and for Fed-SB all of them for the first full step."""
        there = {name: node for node, name in self.connected(grid).items()}
        first = self.ask(grid, there[self.server.names[0]], "start")
        gradients = []
        if self.server.facts.trains == "R":
            gradients = [self.ask(grid, there[name], "gradients") for name in self.server.names]
        self.server.begin(first, gradients)
        self.server.save(self.folder)

    # ---------------------------------------------------------------- rounds
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.began, self.sent = time.perf_counter(), {}
        made = []
        for node, name in self.connected(grid).items():
            instruction = self.server.instruction(name, "train")
            self.sent[node] = size(instruction.flat())
            made.append(self._message(node, "train", "train", name))
        return made

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        found, failed = self._sorted(replies, self.sent)
        failed |= {name: "was not connected" for name in self.server.names if name not in {*failed, *found}}
        record = self.server.take(list(found.values()), failed, sum(self.sent.values()))
        record.seconds = round(time.perf_counter() - self.began, 3)
        self._keep()
        print(engine.sentence(record), flush=True)
        return records._arrays(self.server.tensors), MetricRecord({k: float(v) for k, v in engine.told(record).items()})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        every, last = self.server.config.evaluate_every, self.server.done == self.server.config.rounds
        self.sent = {}
        if not last and not (every and self.server.done % every == 0):
            return []
        tested = {client.name for client in self.server.config.clients if client.test}
        there = {int(node) for node in grid.get_node_ids()}
        self.sent = {node: 0 for node, name in self.nodes.items() if name in tested and node in there}
        return [self._message(node, "evaluate", "evaluate", self.nodes[node]) for node in self.sent]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        found, failed = self._sorted(replies, self.sent)
        record = self.server.rounds[-1]
        for name, reply in found.items():
            record.measured[name] = dict(reply.facts["measures"])
        for name, why in failed.items():
            record.failed.setdefault(name, f"measuring: {why}")
        self._keep()
        means = engine.means(record)
        return MetricRecord(means) if means else None

    def summary(self) -> None:
        """Nothing: the rounds say what happens."""

    # ---------------------------------------------------------------- parts
    def _message(self, node: int, asked: Asked, kind: str, name: str = "") -> Message:
        instruction = self.server.instruction(name, asked)
        return Message(records.packed(instruction, self.server.config), dst_node_id=node, message_type=kind)

    def _sorted(self, replies: Iterable[Message], asked: Iterable[int]) -> tuple[dict[str, Reply], dict[str, str]]:
        """Client -> reply, and client -> why there is none."""
        found: dict[str, Reply] = {}
        failed = {self.nodes[node]: "stopped, or did not answer in time" for node in asked}
        for message in replies:
            name = self.nodes.get(message.metadata.src_node_id, "")
            if not name:  # Flower itself answers for a node that has gone
                continue
            try:
                found[name] = replace(records.reply_of(message), client=name)  # whoever it says it is
                failed.pop(name, None)
            except records.ClientError as error:
                failed[name] = str(error)
        return found, failed

    def _keep(self) -> None:
        self.server.save(self.folder)
        engine.write_history(self.server, self.folder)


def start(strategy: RuleStrategy, grid: Grid) -> Any:
    """Run the rounds that are left."""
    server = strategy.server
    if not server.started:
        strategy.begin(grid)
    left = server.config.rounds - server.done
    return strategy.start(grid, records._arrays(server.tensors), left, strategy.patience) if left > 0 else None
