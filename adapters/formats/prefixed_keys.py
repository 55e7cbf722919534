"""Keys with a prefix for the component, as written by kohya, webui and LyCORIS (flat) and by ComfyUI (dotted).

kohya's keys lose the dots of the module path; :func:`adapters.formats.fit.fit` finds the module by the model's own
names. ComfyUI, XLabs and fal write the same original modules with dots; they are read here too, and the blocks of SD3
and Flux get diffusers' names (:mod:`adapters.formats.original_names`). Text encoders keep transformers' old prefix
``text_model``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from adapters.errors import InputError
from adapters.formats import original_names
from adapters.formats.keys import group_tensors, layer_of, modern_name, written_alpha
from adapters.formats.lora import LoraFile, LoraLayer, group_dict
from adapters.formats.words import BUNDLED

if TYPE_CHECKING:
    from torch import Tensor

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
"""Prefix -> component; "" = the component follows from the module's name."""

FLAT = tuple(prefix for prefix in PREFIXES if prefix.endswith("_"))
"""Prefixes of names that have lost their dots."""


_UNET = re.compile(r"(^|[._])(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)[._]")
_BLOCK = re.compile(r"(^|[._])(blocks|layers)[._]\d")
"""Numbered blocks, of a transformer if the file has none of a UNet's."""


_COMPLETE = re.compile(
    r"^base_model\.model\.(blocks\.\d+\.(attn\.(w[qkvo]|gate)|mlp\.(gate|up|down))|txtfusion|"
    r"layers\.\d+\.self_attention\.to_(q|k|v|out))\."
)
"""Krea 2 and ERNIE-Image in their authors' names, written behind PEFT's prefix with nothing beside them."""


def is_prefixed(names: Iterable[str]) -> bool:
    """True if every name has one of these prefixes or is that of a block of SD3 or Flux."""
    keys = [name for name in names if not name.startswith(BUNDLED)]
    if any(key.startswith("base_model.model.") for key in keys):  # PEFT's prefix, fal's and ai-toolkit's
        return any(original_names.is_original(_place(key)[1]) or _COMPLETE.search(key) for key in keys)
    return bool(keys) and all(key.startswith(tuple(PREFIXES)) or original_names.is_original(key) for key in keys)


def parse_prefixed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> LoraFile:
    """The adapter in such a file; its module paths stay flat where the dots are lost.

    Raises:
        InputError: keys that are not an adapter's, or tensors that do not fit together.
    """
    # some programs write an untrained bias with every difference
    used = {key: tensor for key, tensor in tensors.items() if not key.endswith(".diff_b") or bool(tensor.any())}
    layers = {}
    for (component, module), parts in group_tensors(used, _place, source).items():
        name = f"{component}.{module}"
        layers[component, module] = layer_of(parts, written_alpha(parts, name, source), False, name, source)
    return _named(LoraFile(group_dict(layers), flat=True, metadata=dict(metadata)), source)


def _place(key: str) -> tuple[str, str]:
    """Component and module of a key, with or without its role."""
    prefix = max((prefix for prefix in PREFIXES if key.startswith(prefix)), key=len, default="")
    module = modern_name(re.sub(r"^sformer_blocks", "transformer_blocks", key.removeprefix(prefix)))  # some cut names
    if prefix in FLAT:  # diffusers' DoRA script flattens the names of A and B but not those of the magnitudes
        module = module.replace(".", "_")
    component = PREFIXES.get(prefix, "unet")
    if not component:
        component = "unet" if re.match(r"(down|mid|up)_block", module) else "transformer"
    return component, module


def _named(file: LoraFile, source: str) -> LoraFile:
    """``file`` with diffusers' names for the blocks of SD3 and Flux; all names are flat if any other layer is left."""
    parts = {component: dict(layers) for component, layers in file.parts.items()}
    denoiser = parts.get("unet", {})
    if any(original_names.is_original(name) for name in denoiser):
        if "transformer" in parts:
            raise InputError(f"{source} names the layers of its denoiser in two ways; save it again with one program.")
        if original_names.is_flux(denoiser) and "text_encoder_3" in parts:  # T5 is Flux's second encoder
            parts["text_encoder_2"] = parts.pop("text_encoder_3")
        parts["transformer"] = original_names.renamed(parts.pop("unet"), source)
        if len(parts) == 1:
            return file.with_parts(parts)  # no name is flat any more, so the file converts without a model
    elif denoiser and not any(_UNET.search(name) for name in denoiser) and any(map(_BLOCK.search, denoiser)):
        parts["transformer"] = {**parts.pop("unet"), **parts.get("transformer", {})}
    flat: dict[str, dict[str, LoraLayer]] = {}
    for component, layers in parts.items():
        flat[component] = {name.replace(".", "_"): layer for name, layer in layers.items()}
        if len(flat[component]) != len(layers):
            raise InputError(f"{source}: two layers of its {component} have the same name.")
    return file.with_parts(flat, flat=True)
