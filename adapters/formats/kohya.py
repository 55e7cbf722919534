"""kohya-ss / webui / ComfyUI files: ``lora_unet_<module with _>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``.

The dots of the module path are lost in the key; :func:`adapters.formats.fit.fit` finds the module again by the names
the model has. Text encoders keep transformers' old prefix ``text_model``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from adapters.errors import InputError
from adapters.formats.keys import KOHYA, Role, layer_of, split_role
from adapters.formats.lora import TEXT_ENCODERS, LoraFile, group_dict
from adapters.formats.tensors import write_tensors


def is_kohya(tensors: Mapping[str, Tensor]) -> bool:
    """True if every key has one of kohya's prefixes."""
    return bool(tensors) and all(key.startswith(tuple(KOHYA)) for key in tensors)


def parse_kohya(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> LoraFile:
    """The canonical form of a kohya file, with module paths still flat.

    Raises:
        InputError: keys that are not LoRA keys.
    """
    groups: dict[tuple[str, str], dict[Role, Tensor]] = {}
    for key, tensor in tensors.items():
        found = split_role(key)
        if found is None:
            raise InputError(f"{source}: key '{key}' is not understood.")
        prefix = next(prefix for prefix in KOHYA if key.startswith(prefix))
        groups.setdefault((KOHYA[prefix], found[0].removeprefix(prefix)), {})[found[1]] = tensor
    layers = {}
    for (component, module), parts in groups.items():
        rank = float(parts["A"].shape[0]) if "A" in parts else 1.0
        alpha = float(parts["alpha"].item()) if "alpha" in parts else rank
        layers[component, module] = layer_of(parts, alpha, False, f"{component}.{module}", source)
    return LoraFile(group_dict(layers), "kohya", flat=True, metadata=dict(metadata))


def write_kohya(file: LoraFile, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write ``file`` in kohya's format; returns the path.

    Raises:
        InputError: a component kohya has no name for (its SD3 and Flux files split and rename layers).
    """
    if "transformer" in file.parts:
        raise InputError("The kohya format is written for UNet models only; use the diffusers format for SD3 and Flux.")
    two_encoders = "text_encoder_2" in file.parts
    tensors: dict[str, Tensor] = {}
    for component, module, layer in file.layers():
        prefix = _prefix(component, two_encoders)
        if component in TEXT_ENCODERS and not module.startswith("text_model"):
            module = f"text_model.{module}"
        name = prefix + module.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = layer.A
        tensors[f"{name}.lora_up.weight"] = layer.B
        # alpha / r is kohya's only rule, so rsLoRA's alpha / sqrt(r) is written as the alpha that gives it
        tensors[f"{name}.alpha"] = torch.tensor(layer.scale * layer.rank)
        if layer.magnitude is not None:
            tensors[f"{name}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (layer.A.ndim - 1))
    text = {"ss_network_module": "networks.lora"} | {
        key: value for key, value in file.metadata.items() if key not in ("lora_adapter_metadata", "format")
    }
    return write_tensors(path, tensors, text | dict(metadata or {}))


def _prefix(component: str, two_encoders: bool) -> str:
    if component == "text_encoder":
        return "lora_te1_" if two_encoders else "lora_te_"
    return next(prefix for prefix, name in KOHYA.items() if name == component)
