"""kohya-ss / webui / LyCORIS files (``lora_unet_<module with _>.lora_down.weight``) and those that use their names.

The dots of the module path are lost in kohya's keys; :func:`adapters.formats.fit.fit` finds the module again by the
names the model has. ComfyUI, XLabs and fal write the same original modules with dots; they are read here too, and the
blocks of SD3 and Flux get diffusers' names (:mod:`adapters.formats.original_names`). Text encoders keep transformers'
old prefix ``text_model``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from adapters.errors import InputError
from adapters.formats import original_names
from adapters.formats.keys import (
    Role,
    layer_of,
    modern_name,
    refuse_tables,
    refuse_unknown,
    split_role,
    written_alpha,
)
from adapters.formats.lora import TEXT_ENCODERS, LoraFile, LoraLayer, group_dict
from adapters.formats.tensors import write_tensors
from adapters.formats.words import word_tensors, write_beside

KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
"""kohya's prefix -> component."""

PREFIXES = {
    **KOHYA,
    "lora_transformer_": "transformer",
    "lycoris_": "",
    "diffusion_model.": "unet",
    "model.diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
    "base_model.model.": "unet",
}
"""Every prefix of original names -> component ("" = to be told by the names)."""


def is_kohya(tensors: Mapping[str, Tensor]) -> bool:
    """True if every key has one of these prefixes, or none and the name of a block of SD3 or Flux."""
    keys = list(tensors)
    if any(key.startswith("base_model.model.") for key in keys):  # PEFT's prefix, and fal's
        return any(original_names.is_original(_place(key)[1]) for key in keys)
    return bool(keys) and all(key.startswith(tuple(PREFIXES)) or original_names.is_original(key) for key in keys)


def parse_kohya(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> LoraFile:
    """The canonical form of such a file, with module paths still flat where dots are lost.

    Raises:
        InputError: keys that are not an adapter's, or parts that do not fit each other.
    """
    groups: dict[tuple[str, str], dict[Role, Tensor]] = {}
    strange: list[str] = []
    for key, tensor in tensors.items():
        if key.endswith(".diff_b") and not bool(tensor.any()):
            continue  # an untrained bias, which some programs write beside every difference
        found = split_role(key)
        if found is None:
            strange.append(key)
            continue
        component, module = _place(found[0])
        role = found[1]
        if role in groups.setdefault((component, module), {}):
            raise InputError(f"{source}: two tensors say what '{module}' is (one of them is '{key}').")
        groups[component, module][role] = tensor
    refuse_unknown(strange, source)
    layers = {}
    for (component, module), parts in groups.items():
        name = f"{component}.{module}"
        layers[component, module] = layer_of(parts, written_alpha(parts, name, source), False, name, source)
    return _named(LoraFile(group_dict(layers), "kohya", flat=True, metadata=dict(metadata)), source)


def _place(key: str) -> tuple[str, str]:
    """Component and module of a key (or of its part before the role)."""
    prefix = max((prefix for prefix in PREFIXES if key.startswith(prefix)), key=len, default="")
    module = modern_name(key.removeprefix(prefix))
    if prefix.endswith("_"):  # diffusers' DoRA script flattens the names of A and B, and not those of the magnitudes
        module = module.replace(".", "_")
    component = PREFIXES.get(prefix, "unet")
    if not component:
        component = "unet" if re.match(r"(down|mid|up)_block", module) else "transformer"
    return component, module


def _named(file: LoraFile, source: str) -> LoraFile:
    """``file`` with diffusers' names for the blocks of SD3 and Flux, and flat names if any name has to be."""
    parts = {component: dict(layers) for component, layers in file.parts.items()}
    denoiser = parts.get("unet", {})
    if any(original_names.is_original(name) for name in denoiser):
        if "transformer" in parts:
            raise InputError(f"{source} names the layers of its denoiser in two ways; save it again with one program.")
        if original_names.is_flux(denoiser) and "text_encoder_3" in parts:  # T5 is Flux's second encoder
            parts["text_encoder_2"] = parts.pop("text_encoder_3")
        parts["transformer"] = original_names.renamed(parts.pop("unet"), source)
        if len(parts) == 1:
            return file.with_parts(parts)  # no name is flat any more: such a file converts without a model
    flat: dict[str, dict[str, LoraLayer]] = {}
    for component, layers in parts.items():
        flat[component] = {name.replace(".", "_"): layer for name, layer in layers.items()}
        if len(flat[component]) != len(layers):
            raise InputError(f"{source}: two layers of its {component} have the same name.")
    return file.with_parts(flat, flat=True)


def write_kohya(file: LoraFile, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write ``file`` in kohya's format; returns the path.

    Raises:
        InputError: embeddings, or a component kohya has no name for (its SD3 and Flux files split and rename layers).
    """
    refuse_tables(file, "kohya")
    if "transformer" in file.parts:
        raise InputError("The kohya format is written for UNet models only; use the diffusers format for SD3 and Flux.")
    two_encoders = "text_encoder_2" in file.parts
    tensors = word_tensors(file.words)
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
    return write_tensors(path, tensors, write_beside(replace(file, words={}), path, text | dict(metadata or {})))


def _prefix(component: str, two_encoders: bool) -> str:
    if component == "text_encoder":
        return "lora_te1_" if two_encoders else "lora_te_"
    return next(prefix for prefix, name in KOHYA.items() if name == component)
