"""Feed-forward blocks: which modules they are made of, and how their output is computed from these.

A block is recognised by the names of its parts, and then tried: on a few random inputs the recognised form must give
the block's own output, so a block with something more in it is refused instead of changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from adapters.errors import InputError
from adapters.layers.sizes import device_of, is_linear, sizes


@dataclass(frozen=True)
class Structure:
    """The parts of a feed-forward block by attribute name.

    out = after(down(act(gate x) * (up x))), or down(act(up x)) without a gate; ``fused``: one linear layer gives the
    gate and up halves, in this order.
    """

    up: str
    down: str
    gate: str = ""
    fused: bool = False
    after: str = ""

    @property
    def roles(self) -> dict[str, str]:
        """Role -> name of the linear layer."""
        if self.fused:
            return {"gate_up": self.up, "down": self.down}
        gate = {"gate": self.gate} if self.gate else {}
        return gate | {"up": self.up, "down": self.down}


STRUCTURES = (
    Structure("up_proj", "down_proj", "gate_proj"),  # Llama, Mistral, Qwen, Gemma, SmolLM
    Structure("gate_up_proj", "down_proj", fused=True),  # Phi-3, GLM-4
    Structure("w3", "w2", "w1"),  # LLaMA's original names
    Structure("fc1", "fc2"),  # Phi, CLIP
    Structure("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    Structure("c_fc", "c_proj", after="dropout"),  # GPT-2, StarCoder2
    Structure("up_proj", "down_proj"),  # Nemotron, Arcee
)

ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "gelu_impl")

PATTERNS = ", ".join(dict.fromkeys("/".join(known.roles.values()) for known in STRUCTURES))
"""The names that are recognised."""


def structure_of(block: nn.Module) -> Structure | None:
    """The structure of a feed-forward block, or None if its parts have other names."""
    for known in STRUCTURES:
        parts = [_own(getattr(block, name, None)) for name in known.roles.values()]
        if all(isinstance(part, nn.Module) and is_linear(part) for part in parts) and _activation(block) is not None:
            after = known.after if isinstance(getattr(block, known.after or "-", None), nn.Module) else ""
            return Structure(known.up, known.down, known.gate, known.fused, after)
    return None


def _own(part: Any) -> Any:
    """A part without the adapters around it."""
    return part.get_base_layer() if isinstance(part, BaseTunerLayer) else part


def has_experts(block: nn.Module) -> bool:
    """Whether a block is a mixture of experts already."""
    return isinstance(getattr(block, "experts", None), nn.Module)


def _activation(block: nn.Module) -> Callable[[Tensor], Tensor] | None:
    return next((found for name in ACTIVATIONS if callable(found := getattr(block, name, None))), None)


def inner(block: Any, structure: Structure, first: Mapping[str, Tensor]) -> Tensor:
    """What goes into the block's last layer, for the outputs of its first ones by role."""
    act: Any = _activation(block)
    if structure.fused:
        gate, up = first["gate_up"].chunk(2, -1)
        return act(gate) * up
    return act(first["gate"]) * first["up"] if structure.gate else act(first["up"])


def finished(block: Any, structure: Structure, out: Tensor) -> Tensor:
    """What the block does after its last layer."""
    return getattr(block, structure.after)(out) if structure.after else out


@torch.no_grad()
def check_structure(block: Any, structure: Structure, path: str) -> None:
    """Try the recognised form on random inputs.

    Raises:
        InputError: it does not give the block's output.
    """
    parameters = list(block.parameters())
    if any(parameter.is_meta for parameter in parameters):
        return
    first = [getattr(block, name) for role, name in structure.roles.items() if role != "down"]
    floating = next((p for p in parameters if p.is_floating_point()), None)
    dtype = floating.dtype if floating is not None else torch.float32
    width = sizes(_own(first[0]))[1]
    x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0)).to(device_of(block), dtype)
    was_training = block.training
    block.eval()
    try:
        own = block(x)
        made = getattr(block, structure.down)(
            inner(block, structure, {r: getattr(block, n)(x) for r, n in structure.roles.items() if r != "down"})
        )
    except Exception:
        own = None
    finally:
        block.train(was_training)
    if not isinstance(own, Tensor) or not torch.allclose(own, made, rtol=1e-2, atol=1e-2 * float(own.abs().max())):
        raise unknown(path, block)


def unknown(path: str, block: nn.Module) -> InputError:
    """The refusal of a block whose structure is not known."""
    return InputError(
        f"The feed-forward block '{path}' ({type(block).__name__}) is not of a known structure ({PATTERNS}): set "
        "placement to 'linear'."
    )
