"""What a client does with the server's message: it runs the studio's own training and sends what was trained.

A client keeps in its folder what was sent once (frozen factors, products added to the base) and, with privacy, its
accountant. Its answer is a function of the message, its data and that memory: a round done again gives the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import files
from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.federated.facts import facts
from adapters.federated.participant import Gradients, Participant
from adapters.federated.state import Factors, R, digest, others
from adapters.plugin import Plugin
from adapters.progress import Monitor
from studio.federation.clients import Member, rule_of
from studio.federation.messages import Instruction, Reply
from studio.federation.schema import FederateConfig
from studio.jobs import kinds
from studio.training.export import RECIPE_ENTRY


@dataclass
class Memory:
    """What a client keeps between messages.

    Attributes:
        fixed: frozen factors.
        residual: layer -> factors of everything added to the base so far.
        number: how many residuals of the server that is.
    """

    fixed: dict[str, Tensor] = field(default_factory=dict)
    residual: dict[str, Factors] = field(default_factory=dict)
    number: int = 0

    @classmethod
    def load(cls, folder: Path) -> Memory:
        """The memory in a client's folder, new if there is none."""
        file = folder / "memory.safetensors"
        if not file.is_file():
            return cls()
        kept = load_file(file)
        names = [name.removeprefix("left/") for name in kept if name.startswith("left/")]
        return cls(
            {name.removeprefix("fixed/"): value for name, value in kept.items() if name.startswith("fixed/")},
            {name: (kept[f"left/{name}"], kept[f"right/{name}"]) for name in names},
            int(kept["number"]),
        )

    def save(self, folder: Path) -> None:
        """Write it into the client's folder."""
        kept = {f"fixed/{name}": value for name, value in self.fixed.items()}
        for name, (left, right) in self.residual.items():
            kept |= {f"left/{name}": left, f"right/{name}": right}
        kept["number"] = torch.tensor(self.number)
        with files.whole(folder / "memory.safetensors") as part:
            save_file({name: value.contiguous() for name, value in kept.items()}, part)

    def take(self, message: Instruction) -> None:
        """Add what the message brings.

        Raises:
            InputError: the frozen factors or residuals are not those the server counts on.
        """
        if message.fixed:
            self.fixed = dict(message.fixed)
        wanted = message.facts.get("digest", "")
        if wanted and digest(self.fixed) != wanted:
            raise InputError("This client's frozen factors are not the server's: delete the client's folder.")
        number = int(message.facts.get("number", 0))
        first = number - len(message.residual)
        if first > self.number:
            raise InputError(f"This client misses what was added to the base in {first - self.number} rounds.")
        for layers in message.residual[self.number - first :]:
            for name, product in layers.items():
                self.residual[name] = added(self.residual.get(name), product)
        self.number = max(number, self.number)


def added(earlier: Factors | None, product: Factors) -> Factors:
    """Factors of a sum; a dense matrix and the identity once they would be larger than that."""
    if earlier is None:
        return product
    left, right = torch.cat([earlier[0], product[0]], dim=1), torch.cat([earlier[1], product[1]])
    out, inputs = left.shape[0], right.shape[1]
    if left.shape[1] <= min(out, inputs):
        return left, right
    dense = left @ right
    return (dense, torch.eye(inputs)) if inputs <= out else (torch.eye(out), dense)


def answer(message: Instruction, config: FederateConfig, member: Member, folder: Path, monitor: Monitor) -> Reply:
    """Do what the message asks.

    Args:
        folder: the client's own.

    Raises:
        InputError: something that cannot be trained, or a message that does not belong to this client's model.
        Cancelled: ``monitor`` asked to stop; the folder is as before.
    """
    from studio.federation import private

    rule, memory = rule_of(config), Memory.load(folder)
    memory.take(message)
    seed = member.seed(config.seed, message.round)
    if message.asked == "gradients":
        measure = Gradients(config.sb_batches)
        made = _run(member.config(seed), folder, monitor, [measure], start=True)
        return Reply(member.name, measure.found, facts=told_of(*made))
    learnt = begin(rule, memory, message, seed)
    plugins: list[Plugin] = [learnt]
    guard = None
    if message.asked == "train" and config.privacy == "sample":
        guard = private.Guard.of(config, folder / "privacy.json", message.round)
        plugins.append(guard)
    training = member.config(_start_seed(config, message, seed), measured=message.asked == "evaluate")
    result, recipe = _run(training, folder, monitor, plugins, start=message.asked != "train")
    told = told_of(result, recipe)
    if message.asked == "start":
        told |= {"scales": learnt.scales(), "inputs": learnt.inputs()}
        return Reply(member.name, _sent(learnt, rule), learnt.frozen(), told)
    if message.asked == "evaluate":
        return Reply(member.name, facts=told)
    if guard is not None:
        told["epsilon"] = guard.spent()
        guard.save()
    memory.save(folder)
    return Reply(member.name, learnt.collected(), facts=told)


def begin(rule: Method, memory: Memory, message: Instruction, seed: int = 0, **more: Any) -> Participant:
    """The plugin that starts a training from a message."""
    received = None if message.asked == "start" else message.tensors
    return Participant(facts(rule), received, memory.fixed, memory.residual, seed, **more)


def told_of(result: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a reply: examples, the base's digest, the loss and what was measured."""
    data = recipe.get("data", {})
    last = (result.get("validation") or [{}])[-1]
    measures = {name: float(value) for name, value in last.items() if name != "step"}
    if result.get("loss") is not None:
        measures["loss"] = float(result["loss"])
    return {
        "examples": int(data.get("rows") or data.get("pictures") or 0),
        "base": recipe.get("base", {}).get("digest", ""),
        "measures": measures,
        "seconds": float(result.get("seconds") or 0.0),
        "steps": int(result.get("steps") or 0),
    }


def _sent(learnt: Participant, rule: Method) -> dict[str, Tensor]:
    """What the first round begins with: no cores of Fed-SB, which come from the gradients, and no factors that every
    client draws anew."""
    found = learnt.collected()
    names = others(found) if facts(rule).redraws else [name for name in found if not name.endswith(R)]
    return {name: found[name] for name in names}


def _start_seed(config: FederateConfig, message: Instruction, seed: int) -> int:
    """The first adapter is drawn from the federation's own seed."""
    return config.seed if message.asked == "start" else seed


def _run(
    config: Any, folder: Path, monitor: Monitor, plugins: list[Plugin], start: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train, or only ``start``, in a folder that is removed afterwards; returns the result and the recipe."""
    place = folder / "training"
    shutil.rmtree(place, ignore_errors=True)
    try:
        run = kinds.find(config.kind).function()
        result = run(config, place, monitor, plugins=plugins, keep="start" if start else False)
        return result, recipe_of(Path(result["adapter"]))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def recipe_of(adapter: Path) -> dict[str, Any]:
    """The recipe in an adapter that a training wrote."""
    file = adapter / "adapter_model.safetensors" if adapter.is_dir() else adapter
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    found: dict[str, Any] = json.loads(metadata.get(RECIPE_ENTRY, "{}"))
    return found
