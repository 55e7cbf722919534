"""What server and clients send each other: named tensors, and facts as plain values.

Tensors are fp32 (bf16 has no form on Flower's wire); nothing is pickled. Sizes are those of the tensors' bytes, apart
from names and facts, which :func:`encoded` adds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Asked = Literal["start", "gradients", "train", "evaluate"]


@dataclass(frozen=True)
class Instruction:
    """The server's message to one client.

    Attributes:
        asked: what to do: begin as the training does and send that; measure the first full step; train; measure.
        round: number of the round, from 1.
        tensors: what the round begins with.
        fixed: frozen factors, sent once.
        residual: layer -> (left, right) added to the base since the client's last message, in order.
        facts: ``digest`` of the frozen factors, ``number`` of residuals there are altogether, ``steps_before``.
    """

    asked: Asked
    round: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    residual: list[Mapping[str, tuple[Tensor, Tensor]]] = field(default_factory=list)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def flat(self) -> dict[str, Tensor]:
        """All tensors, by names that :func:`instruction` takes apart."""
        found = {f"tensors/{name}": value for name, value in self.tensors.items()}
        found |= {f"fixed/{name}": value for name, value in self.fixed.items()}
        for number, layers in enumerate(self.residual):
            for name, (left, right) in layers.items():
                found |= {f"left/{number}/{name}": left, f"right/{number}/{name}": right}
        return found

    @property
    def once(self) -> int:
        """Bytes of what is sent once."""
        return size(self.fixed)

    @property
    def each_round(self) -> int:
        """Bytes of what is sent every round."""
        return size(self.flat()) - self.once


@dataclass(frozen=True)
class Reply:
    """A client's answer.

    Attributes:
        tensors: what was trained (or, at the start, drawn; or gradients).
        fixed: frozen factors that the client drew, at the start.
        facts: ``examples``, ``measures`` (name -> number), ``base`` (digest of its weights), ``scales`` ...
    """

    client: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def flat(self) -> dict[str, Tensor]:
        found = {f"tensors/{name}": value for name, value in self.tensors.items()}
        return found | {f"fixed/{name}": value for name, value in self.fixed.items()}


def instruction(asked: Asked, number: int, flat: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Instruction:
    """The message of :meth:`Instruction.flat`."""
    residual: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, value in flat.items():
        if name.startswith("left/"):
            _, place, layer = name.split("/", 2)
            residual.setdefault(int(place), {})[layer] = (value, flat[f"right/{place}/{layer}"])
    return Instruction(
        asked, number, _under(flat, "tensors/"), _under(flat, "fixed/"), [residual[n] for n in sorted(residual)], facts
    )


def reply(client: str, flat: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Reply:
    """The answer of :meth:`Reply.flat`."""
    return Reply(client, _under(flat, "tensors/"), _under(flat, "fixed/"), facts)


def encoded(flat: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """A message as one safetensors buffer, facts in its metadata."""
    from safetensors.torch import save

    return save({name: value.contiguous() for name, value in flat.items()}, {"facts": json.dumps(facts)})


def size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors."""
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _under(flat: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)}
