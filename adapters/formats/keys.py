"""The grammar of LoRA keys:  [prefix] module path, then the role of the tensor (:mod:`adapters.layers.kinds`).

    unet.down_blocks.0.attentions.0...attn1.to_q.lora_A.weight            diffusers (PEFT layers), ai-toolkit
    unet.down_blocks.0...attn1.processor.to_q_lora.down.weight            diffusers before PEFT ("attn procs")
    text_encoder.text_model...q_proj.lora_linear_layer.down.weight        diffusers before PEFT, text encoder
    base_model.model.down_blocks.0...to_q.lora_A.weight                   PEFT
    lora_unet_down_blocks_0_..._to_q.lora_down.weight, .alpha             kohya / webui / LyCORIS
    lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight      OneTrainer
    lycoris_transformer_blocks_0_attn_to_q.lokr_w1                        LyCORIS without kohya (SimpleTuner)
    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight            ComfyUI
    double_blocks.0.processor.qkv_lora1.down.weight                       XLabs
    base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight           fal

Formats that cannot be composed are recognised by their keys and refused by name, with the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from adapters.errors import InputError
from adapters.formats.lora import COMPONENTS, LoraLayer
from adapters.layers.kinds import factors, split_role
from adapters.layers.kinds.dora import magnitude

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["guess_component", "layer_of", "modern_name", "refuse_foreign", "split_component", "split_role"]

_NEEDS_BASE = "its update depends on the base model's weights, so it cannot be added to other adapters"
FOREIGN: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern), name, reason)
    for pattern, name, reason in (
        (r"\.oft_|\.oft_R|\.boft_", "OFT", _NEEDS_BASE),
        (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$", "GLoRA", _NEEDS_BASE),
        (r"\.on_input$|\.ia3_l", "IA3", _NEEDS_BASE),
        (r"\.(w|b)_norm$", "trained normalisation layers", "only linear layers and convolutions can be composed"),
        (r"new_concept_embedding", "ED-LoRA", "it is read from its own .pth file only"),
        (r"_lora_embedding_", "LoRA on an embedding table with flat names", "it is read from PEFT's own keys only"),
        (r"\.lora_B\.bias$|\.(query|key)_norm\.scale$", "LoRA that also trains biases or normalisation (BFL control)",
         "it belongs to a control pipeline with more input channels, not to the base model"),
        (r"\.vera_lambda", "VeRA", "its shared random matrices are not in the file"),
    )
)  # fmt: skip
"""Known formats that are refused, and why."""

_WHAT_IS_READ = "supported are LoRA, DoRA, LoCon, LoHa and LoKr as PEFT directories, diffusers, kohya or ComfyUI files"

_LARGEST = 3.4e38
"""The largest value of fp32, in which updates are computed."""


def split_component(module: str) -> tuple[str, str]:
    """``(component, module path)``; the component is empty if the key does not name one."""
    first, _, rest = module.partition(".")
    if first in COMPONENTS:
        return first, modern_name(rest)
    return "", modern_name(module)


def modern_name(module: str) -> str:
    """Old diffusers module names in today's spelling: ``attn1.processor.to_out`` -> ``attn1.to_out.0``."""
    old_processor = ".processor." in module
    module = module.replace(".processor.", ".")
    if old_processor and module.endswith(".to_out"):
        return f"{module}.0"
    if ".self_attn.to_" in module:  # text encoders before PEFT
        return re.sub(r"\.self_attn\.to_(q|k|v|out)$", lambda m: f".self_attn.{m[1]}_proj", module)
    return module


def guess_component(modules: Iterable[str]) -> str:
    """The component that unprefixed module paths belong to, by names that occur in one only; empty if unknown."""
    names = " ".join(modules)
    if re.search(r"\b(down_blocks|mid_block|up_blocks)\.", names):
        return "unet"
    if re.search(r"\b(single_)?transformer_blocks\.|(^| )blocks\.\d+\.(attn[12]|self_attn|cross_attn|ffn)\.", names):
        return "transformer"
    if re.search(r"\bencoder\.layers\.", names):
        return "text_encoder"
    return ""


def refuse_foreign(keys: Iterable[str], source: str) -> None:
    """Raise :class:`InputError` with the format's name and the reason if any key belongs to one we refuse."""
    for key in keys:
        for pattern, name, reason in FOREIGN:
            if pattern.search(key):
                raise InputError(f"{source} is in the format '{name}' (key '{key}'): {reason}; {_WHAT_IS_READ}.")


def refuse_unknown(keys: list[str], source: str) -> None:
    """Raise :class:`InputError` if there are ``keys``, which no format explained."""
    if keys:
        shown = ", ".join(f"'{key}'" for key in keys[:3])
        raise InputError(
            f"{source}: {len(keys)} keys are not understood ({shown}{', ...' if len(keys) > 3 else ''}); "
            f"{_WHAT_IS_READ}."
        )


def group_tensors(
    tensors: Mapping[str, Tensor], place: Callable[[str], tuple[str, str]], source: str
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """(component, module) -> the tensors of that layer by role; ``place`` finds both in a key without its role.

    Raises:
        InputError: keys that are not an adapter's, or two tensors for one role.
    """
    groups: dict[tuple[str, str], dict[str, Tensor]] = {}
    strange: list[str] = []
    for key, tensor in tensors.items():
        found = split_role(key)
        if found is None:
            strange.append(key)
            continue
        parts = groups.setdefault(place(found[0]), {})
        if found[1] in parts:
            raise InputError(f"{source}: '{found[0]}' has two tensors for one role (one is '{key}').")
        parts[found[1]] = tensor
    refuse_unknown(strange, source)
    return groups


def written_alpha(parts: Mapping[str, Tensor], name: str, source: str) -> float | None:
    """The alpha stored for a layer, or None.

    Raises:
        InputError: not one finite number.
    """
    if "alpha" not in parts:
        return None
    tensor = parts["alpha"]
    if tensor.numel() != 1 or tensor.is_complex():
        raise InputError(f"{source}: the alpha of '{name}' is not one number but {tuple(tensor.shape)} {tensor.dtype}.")
    return float(tensor.item())


def layer_of(
    parts: Mapping[str, Tensor], alpha: float | None, rslora: bool, name: str, source: str, scaled: bool = False
) -> LoraLayer:
    """Build a layer from its tensors (role -> tensor), checking that they belong together.

    Args:
        alpha: numerator of the scale; None = the scale is 1.
        scaled: alpha is the scale itself, as with PEFT's LoHa and LoKr.

    Raises:
        InputError: tensors are missing or do not multiply, or the scale is not finite.
    """
    made = factors(parts, name, source)
    rank = made.A.shape[0]
    plain = made.dim == rank and not scaled
    if plain:
        value = float(rank**0.5 if rslora else rank) if alpha is None else alpha
    else:  # alpha is divided by the rank of the stored factors, not by the rank of A
        dim = 1.0 if scaled else float(made.dim**0.5 if rslora else made.dim)
        value = float(rank) if alpha is None or (not made.dim and not scaled) else alpha / dim * rank
    if not math.isfinite(value):
        raise InputError(f"{source}: the scale of layer '{name}' is not a finite number (alpha {alpha}).")
    norm = magnitude(parts, made.B.shape[0], name, source)
    layer = LoraLayer(made.A, made.B, value, rslora and plain, norm, embedding="table_A" in parts)
    _check_product(layer, name, source)
    return layer


def _check_product(layer: LoraLayer, name: str, source: str) -> None:
    """Refuse finite values whose product s B A is not finite; computed only where it could overflow."""
    largest = float(layer.A.abs().max()) * float(layer.B.abs().max()) * layer.rank * abs(layer.scale)
    if largest > _LARGEST and not bool(layer.delta().isfinite().all()):
        raise InputError(f"{source}: the values of layer '{name}' are so large that their product overflows.")
