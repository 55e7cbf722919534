"""The server of a federation, without a network: what it sends to whom, and what it makes of the replies.

Everything is a function of the configuration, the replies and the state, which is saved after every round; a resumed
run therefore equals an uninterrupted one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import files
from adapters.errors import InputError, StudioError
from adapters.federated import fed_sb
from adapters.federated.facts import facts
from adapters.federated.state import A, Factors, Options, Rule, check_reply, digest, layer_shapes, others, sides
from studio.federation.clients import rule_of
from studio.federation.messages import Asked, Instruction, Reply, size
from studio.federation.schema import FederateConfig


@dataclass
class Round:
    """What is known of one round.

    Attributes:
        number: from 1; 0 is the start.
        clients: name -> its measures of the training.
        failed: name -> why its answer does not count.
        measured: name -> measures of the shared adapter on its test data, after the round.
        bias: mean over layers of the relative bias that the rule leaves, if the rule reports it.
        up, down: bytes of tensors that all clients sent and received.
        epsilon: name -> spent so far.
    """

    number: int
    clients: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    up: int = 0
    down: int = 0
    seconds: float = 0.0
    epsilon: dict[str, float] = field(default_factory=dict)

    def mean(self, measure: str) -> float | None:
        """Mean of a measure of the shared adapter over the clients that have it."""
        found = [values[measure] for values in self.measured.values() if measure in values]
        return sum(found) / len(found) if found else None

    def layer_mean(self, measure: str) -> float | None:
        """Mean over the layers of a measure of the aggregation."""
        found = [values[measure] for values in self.layers.values() if measure in values]
        return sum(found) / len(found) if found else None

    def as_json(self) -> dict[str, Any]:
        """Plain values for files and pages."""
        return {**self.__dict__, "bias": self.layer_mean("bias")}


@dataclass
class Server:
    """The server's state.

    Attributes:
        names: of all clients.
        tensors: what the next round begins with.
        fixed: frozen factors, sent once.
        residuals: of every round, what it added to the base.
        known: client -> (has the frozen factors, how many residuals it has).
        rounds: the rounds done, the start as number 0.
        base: digest of the base's weights, the same for every client.
        scales, inputs: layer -> s, and shape of A without its rank.
    """

    config: FederateConfig
    names: list[str]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)
    residuals: list[dict[str, Factors]] = field(default_factory=list)
    known: dict[str, tuple[bool, int]] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    base: str = ""
    scales: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.method = rule_of(self.config)
        self.facts = facts(self.method)

    @property
    def done(self) -> int:
        """Rounds done."""
        return self.rounds[-1].number if self.rounds else 0

    @property
    def started(self) -> bool:
        return bool(self.rounds)

    @property
    def needed(self) -> int:
        """Clients that must answer."""
        return self.config.min_clients or len(self.names) // 2 + 1

    # ---------------------------------------------------------------- sending
    def instruction(self, client: str, asked: Asked) -> Instruction:
        """The message to one client; it counts as received once :meth:`delivered` is called."""
        if asked in ("start", "gradients"):
            return Instruction(asked)
        has_fixed, number = self.known.get(client, (False, 0))
        told = {"digest": digest(self.fixed) if self.fixed else "", "number": len(self.residuals)}
        return Instruction(
            asked, self.done + 1, self.tensors, {} if has_fixed else self.fixed, list(self.residuals[number:]), told
        )

    def delivered(self, client: str) -> None:
        """The client answered a training, so it has what was sent before."""
        self.known[client] = (True, len(self.residuals))

    # ---------------------------------------------------------------- receiving
    def begin(self, first: Reply, gradients: Sequence[Reply]) -> None:
        """Take the first client's start and, for Fed-SB, the gradients.

        Raises:
            InputError: a reply that is not such a start or such gradients (the client is named), or gradients from
                which no basis can be made; the state is as before.
        """
        try:
            scales, inputs = _layers_told(first)
            self._check_start(first, scales, inputs)
            for reply in gradients:
                self._check_gradients(reply, gradients[0], first, inputs)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # another program, or another version
            raise InputError(f"A client's start has facts that cannot be read ({error}).") from None
        record = Round(0, up=size(first.flat()) + sum(size(reply.flat()) for reply in gradients))
        self.scales, self.inputs = scales, inputs
        self.tensors, self.fixed, self.base = dict(first.tensors), dict(first.fixed), str(first.facts["base"])
        if self.facts.trains == "R":
            found = [reply.tensors for reply in gradients]
            self.fixed, cores = fed_sb.basis(found, self._rank(), self.scales, self._step(), self.config.seed)
            self.tensors |= cores
        self.shapes = {name: list(value.shape) for name, value in self.tensors.items()}
        if self.facts.redraws:
            self.shapes = {}
        self.rounds = [record]

    def take(self, replies: Sequence[Reply], failed: Mapping[str, str], down: int = 0) -> Round:
        """Combine the replies of a round.

        Args:
            failed: client -> why it did not answer.
            down: bytes that were sent to the clients.

        Returns:
            The round's record, in which replies that cannot be used are named with the failed ones.

        Raises:
            StudioError: fewer usable replies than needed; the state is as before.
        """
        record = Round(self.done + 1, failed=dict(failed), down=down)
        good = []
        place = {name: number for number, name in enumerate(self.names)}  # sums do not depend on who was first
        for reply in sorted(replies, key=lambda reply: place.get(reply.client, len(place))):
            try:
                self._check(reply)
            except InputError as error:
                record.failed[reply.client] = str(error)
                continue
            except (KeyError, TypeError, ValueError, AttributeError) as error:  # another program, or another version
                record.failed[reply.client] = f"The client '{reply.client}' sent facts that cannot be read ({error})."
                continue
            good.append(reply)
        if len(good) < self.needed:
            told = "; ".join(f"{name}: {why}" for name, why in record.failed.items())
            raise StudioError(
                f"Round {record.number} has {len(good)} usable answers, but needs {self.needed} "
                f"({told or 'no client answered'}): resume when more clients can answer, or lower min_clients."
            )
        uniform = self.config.weights == "uniform"
        weights = [1.0 if uniform else float(reply.facts["examples"]) for reply in good]
        rule = cast(Rule, self.method.load())
        made = rule([reply.tensors for reply in good], weights, self._options())
        for reply in good:
            self.delivered(reply.client)
            record.clients[reply.client] = {**reply.facts["measures"], "examples": float(reply.facts["examples"])}
            if "epsilon" in reply.facts:
                record.epsilon[reply.client] = float(reply.facts["epsilon"])
        record.up = sum(size(reply.flat()) for reply in replies)
        record.layers = made.report
        self.tensors = made.tensors
        if self.facts.changes_base:
            self.residuals.append(made.residual)
        self.rounds.append(record)
        return record

    def _check_start(self, first: Reply, scales: Mapping[str, float], inputs: Mapping[str, list[int]]) -> None:
        """Factors of every layer that is named, as the rule begins with them, and nothing else but whole tensors."""
        if not str(first.facts["base"]):
            raise InputError(f"The client '{first.client}' does not say which base it trains.")
        whole = {name: list(first.tensors[name].shape) for name in others(first.tensors)}
        pairs = layer_shapes({**first.tensors, **first.fixed}, scales, inputs)
        if self.facts.trains == "R" or self.facts.redraws:
            pairs = {}
        frozen = {name: shape for name, shape in pairs.items() if self.facts.trains == "B" and name.endswith(A)}
        check_reply(first.fixed, frozen, first.client)
        check_reply(first.tensors, {**{k: v for k, v in pairs.items() if k not in frozen}, **whole}, first.client)

    def _check_gradients(self, reply: Reply, other: Reply, first: Reply, inputs: Mapping[str, list[int]]) -> None:
        """A gradient of every layer, of the same base and shapes."""
        if reply.facts["base"] != first.facts["base"]:
            raise InputError(f"The client '{reply.client}' measured another base: all need the same.")
        found = {name: sides(other.tensors.get(name)) for name in first.facts["scales"]}
        expected = {
            name: (out, math.prod(inputs[name]) if name in inputs else width) for name, (out, width) in found.items()
        }
        check_reply(reply.tensors, expected, reply.client)

    def _check(self, reply: Reply) -> None:
        if str(reply.facts.get("base", "")) != self.base:
            raise InputError(f"The client '{reply.client}' trained another base: all need the same.")
        if not int(reply.facts.get("examples", 0)) > 0:
            raise InputError(f"The client '{reply.client}' has no examples.")
        if not math.isfinite(sum(reply.facts["measures"].values())):
            raise InputError(f"The client '{reply.client}' reports a loss that is not finite.")
        shapes = self.shapes or {name: list(value.shape) for name, value in reply.tensors.items()}
        check_reply(reply.tensors, shapes, reply.client, self.facts.ragged)
        self.shapes = shapes

    def _options(self) -> Options:
        return Options(
            rank=self._rank() if self.config.method == "flexlora" else None,
            correction=self.config.correction, strength=self.config.strength,
        )  # fmt: skip

    def _rank(self) -> int:
        ranks = [client.rank for client in self.config.clients if client.rank]
        return max([*ranks, int(self._setting("rank"))])

    def _step(self) -> float:
        return self.config.sb_step or float(self._setting("learning_rate")) / 10

    def _setting(self, key: str) -> Any:
        from studio.jobs import kinds

        schema = kinds.trainings()[self.config.train].model()
        return self.config.training.get(key, schema.model_fields[key].default)

    # ---------------------------------------------------------------- keeping
    def save(self, folder: Path) -> None:
        """Write the state as ``server/`` in ``folder``, whole or not at all."""
        kept = {f"tensors/{name}": value for name, value in self.tensors.items()}
        kept |= {f"fixed/{name}": value for name, value in self.fixed.items()}
        for number, layers in enumerate(self.residuals):
            for name, (left, right) in layers.items():
                kept |= {f"left/{number}/{name}": left, f"right/{number}/{name}": right}
        plain = {
            "config": self.config.model_dump(mode="json"), "names": self.names, "known": self.known, "base": self.base,
            "shapes": self.shapes, "scales": self.scales, "inputs": self.inputs,
            "rounds": [record.__dict__ for record in self.rounds],
        }  # fmt: skip
        with files.whole(folder / "server") as part:
            part.mkdir()
            save_file({name: value.contiguous() for name, value in kept.items()}, part / "tensors.safetensors")
            (part / "state.json").write_text(json.dumps(plain), encoding="utf-8")

    @classmethod
    def load(cls, config: FederateConfig, names: list[str], folder: Path) -> Server:
        """The state saved in ``folder``, new if there is none.

        Raises:
            InputError: it is of another configuration (the keys are named), or damaged.
        """
        place = folder / "server"
        if not place.is_dir():
            return cls(config, names)
        try:
            plain = json.loads((place / "state.json").read_text(encoding="utf-8"))
            kept = load_file(place / "tensors.safetensors")
        except Exception as error:
            raise InputError(f"The state in '{place}' is damaged ({error}): start a new run.") from None
        now, then = config.model_dump(mode="json"), plain["config"]
        differing = [key for key in now if now[key] != then.get(key) and key not in FREE]
        if differing or names != plain["names"]:
            raise InputError(
                f"This run was started with other settings ({', '.join(differing) or 'clients'}): set those back, or "
                "start a new run."
            )
        made = cls(config, names)
        made.base, made.shapes = plain["base"], plain["shapes"]
        made.scales, made.inputs = plain["scales"], plain["inputs"]
        made.known = {name: (bool(has), int(number)) for name, (has, number) in plain["known"].items()}
        made.rounds = [Round(**record) for record in plain["rounds"]]
        count = 1 + max((int(name.split("/")[1]) for name in kept if name.startswith("left/")), default=-1)
        made.residuals = [{} for _ in range(max(count, made.done if made.facts.changes_base else 0))]
        for name, value in kept.items():
            where, _, rest = name.partition("/")
            if where == "tensors":
                made.tensors[rest] = value
            elif where == "fixed":
                made.fixed[rest] = value
            elif where == "left":
                number, _, layer = rest.partition("/")
                made.residuals[int(number)][layer] = (value, kept[f"right/{rest}"])
        return made


def _layers_told(first: Reply) -> tuple[dict[str, float], dict[str, list[int]]]:
    """The scale of every layer, and the shape of its inputs, as plain values."""
    scales = {str(name): float(value) for name, value in first.facts["scales"].items()}
    inputs = {str(name): [int(size) for size in shape] for name, shape in first.facts.get("inputs", {}).items()}
    if not scales:
        raise InputError(f"The client '{first.client}' names no layer that it trains.")
    for name, value in scales.items():
        if not math.isfinite(value) or value == 0:
            raise InputError(f"The client '{first.client}' gives '{name}' the scale {value}, which nothing can have.")
    return scales, inputs


FREE = frozenset({"rounds", "min_clients", "evaluate_every", "name"})
"""Keys that may change when a run is resumed."""
