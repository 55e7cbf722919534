"""The federation's messages as Flower's records: tensors as an ArrayRecord, the rest as JSON in a ConfigRecord."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from adapters.errors import StudioError
from studio.federation import messages
from studio.federation.messages import Asked, Instruction, Reply

SHARED = ("method", "rounds", "train", "training", "seed", "privacy", "target_epsilon", "delta", "clip", "sb_batches")
"""Keys of the configuration in which server and clients must agree."""


class ClientError(StudioError):
    """What a client answered instead of a result."""


def shared(config: Any) -> dict[str, Any]:
    """The part of a configuration in which server and clients must agree; paths of the base may differ."""
    found = {key: value for key, value in config.model_dump(mode="json").items() if key in SHARED}
    found["training"] = {key: value for key, value in found["training"].items() if key not in ("base", "device")}
    return found


def packed(instruction: Instruction, config: Any) -> RecordDict:
    """The content of the server's message."""
    told = {"round": instruction.round, "facts": dict(instruction.facts), "shared": shared(config)}
    return RecordDict({"arrays": _arrays(instruction.flat()), "config": ConfigRecord({"told": json.dumps(told)})})


def unpacked(message: Message, asked: Asked) -> tuple[Instruction, dict[str, Any]]:
    """The server's message, and the settings it was made with."""
    told = json.loads(str(message.content["config"]["told"]))
    return messages.instruction(asked, told["round"], _tensors(message), told["facts"]), told["shared"]


def answered(reply: Reply) -> RecordDict:
    """The content of a client's message."""
    told = {"client": reply.client, "facts": dict(reply.facts)}
    return RecordDict({
        "arrays": _arrays(reply.flat()),
        "metrics": MetricRecord({"num-examples": int(reply.facts.get("examples", 0))}),
        "config": ConfigRecord({"told": json.dumps(told)}),
    })  # fmt: skip


def refused(client: str, why: str) -> RecordDict:
    """The content of a client's message that says why there is no result."""
    return RecordDict({"config": ConfigRecord({"told": json.dumps({"client": client, "error": why})})})


def reply_of(message: Message) -> Reply:
    """A client's message.

    Raises:
        ClientError: it failed; the message says why, as far as is known.
    """
    if message.has_error():
        raise ClientError(str(message.error.reason or "did not answer").splitlines()[0])
    try:
        told = json.loads(str(message.content["config"]["told"]))
        if "error" in told:
            raise ClientError(str(told["error"]))
        return messages.reply(str(told["client"]), _tensors(message), dict(told["facts"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ClientError(f"sent an answer that cannot be read ({error})") from None


def _arrays(flat: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord(torch_state_dict=dict(flat))


def _tensors(message: Message) -> dict[str, Tensor]:
    return dict(message.content["arrays"].to_torch_state_dict()) if "arrays" in message.content else {}
