"""Weights stored in few bits, as bitsandbytes, torchao, diffusers' GGUF layers and our packed layers keep them.

The engine never reads such a weight: adapters act on the layer's output, beside its own product. Only what needs the
numbers themselves (the norm of DoRA, inspections) asks for the weight, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from adapters.errors import MissingDependencyError


def storage(module: nn.Module) -> str:
    """How the weight of ``module`` is stored: "nf4", "fp4", "int8" (bitsandbytes), "torchao int8" ..., "gguf q4_0" ...;
    "" if it is an ordinary tensor (also one of 8-bit floats) or there is none."""
    weight: Any = getattr(module, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit":
        return str(weight.quant_type)
    if kind == "Int8Params":
        return "int8"
    if kind == "GGUFParameter":
        return f"gguf {weight.quant_type.name.lower()}"
    if hasattr(module, "dequantise"):
        return str(module.stored_as)
    if type(weight).__module__.startswith("torchao."):
        bits = str(getattr(weight, "target_dtype", None) or "int8").removeprefix("torch.")
        return f"torchao {bits}"
    return ""


@torch.no_grad()
def plain_weight(module: nn.Module) -> Tensor:
    """The weight of ``module`` in floating point: a new tensor if it is stored in few bits, else its own.

    Raises:
        MissingDependencyError: a GGUF weight without the package ``gguf``.
    """
    packed: Any = module
    if hasattr(packed, "dequantise"):
        found: Tensor = packed.dequantise()
        return found
    weight: Any = module.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        if getattr(weight.quant_state, "packing_format_for_cpu", False):  # undone as bitsandbytes does to save it
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked

            weight.data, weight.quant_state = unpacked(weight.data, weight.quant_state)
        return dequantize_bnb_weight(weight)
    if kind == "Int8Params":  # PEFT's function for modules leaves the layer without its scales
        return dequantize_bnb_weight(weight, state=module.state)
    if kind == "GGUFParameter":
        return _of_gguf(weight)
    if type(weight).__module__.startswith("torchao."):
        return weight.dequantize()
    return weight


def plain_tensor(tensor: Tensor) -> Tensor:
    """A detached parameter without the class of its library: torchao's in floating point, others as their codes."""
    if type(tensor).__module__.startswith("torchao."):
        dequantized: Any = tensor.detach()
        return dequantized.dequantize()
    return tensor.detach().as_subclass(Tensor)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of every tensor of ``model``, scales and tables of stored weights included; shared ones count once."""
    seen: dict[tuple[int, int], int] = {}
    for module in model.modules():
        held: list[Any] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        state = getattr(module, "state", None)  # LLM.int8 keeps its scales beside the weight
        held += [part for name in ("CB", "SCB") if isinstance(part := getattr(state, name, None), Tensor)]
        for tensor in held:
            for part in _parts(tensor):
                seen[part.data_ptr(), part.nbytes] = part.nbytes
    return sum(seen.values())


def _parts(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors of which a parameter is made."""
    if type(tensor).__module__.startswith("torchao."):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
        return
    yield tensor.detach().as_subclass(Tensor)
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        for name in ("absmax", "code", "offset"):
            if isinstance(part := getattr(state, name, None), Tensor):
                yield part
        state = getattr(state, "state2", None)
    if isinstance(scales := getattr(tensor, "SCB", None), Tensor):
        yield scales


def _of_gguf(weight: Any) -> Tensor:
    try:
        from gguf import dequantize
    except ImportError:
        raise MissingDependencyError("gguf", "quantized", "Reading a GGUF weight") from None
    numbers = weight.detach().as_subclass(Tensor).cpu().numpy()
    # diffusers computes the values in the precision of the file's scales
    return torch.from_numpy(dequantize(numbers, weight.quant_type)).half().float().to(weight.device)
