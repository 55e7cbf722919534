"""The grammar of LoRA keys:  [prefix] module path, then what the tensor is.

    unet.down_blocks.0.attentions.0...attn1.to_q.lora_A.weight            diffusers (PEFT layers)
    unet.down_blocks.0...attn1.processor.to_q_lora.down.weight            diffusers before PEFT ("attn procs")
    text_encoder.text_model...q_proj.lora_linear_layer.down.weight        diffusers before PEFT, text encoder
    base_model.model.down_blocks.0...to_q.lora_A.weight                   PEFT
    lora_unet_down_blocks_0_..._to_q.lora_down.weight, .alpha             kohya / webui

What a key says it is but we cannot use yet is refused by the format's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor

from adapters.errors import InputError
from adapters.formats.lora import COMPONENTS, LoraLayer

Role = Literal["A", "B", "alpha", "magnitude"]

_ROLES: dict[Role, tuple[str, ...]] = {
    "A": (
        r"\.lora_A(\.default)?\.weight$",
        r"\.lora_down\.weight$",
        r"(\.|_)lora\.down\.weight$",
        r"\.lora_linear_layer\.down\.weight$",
    ),
    "B": (
        r"\.lora_B(\.default)?\.weight$",
        r"\.lora_up\.weight$",
        r"(\.|_)lora\.up\.weight$",
        r"\.lora_linear_layer\.up\.weight$",
    ),
    "alpha": (r"\.alpha$",),
    "magnitude": (r"\.lora_magnitude_vector(\.default)?(\.weight)?$", r"\.dora_scale$"),
}
ROLES = tuple((re.compile(pattern), role) for role, patterns in _ROLES.items() for pattern in patterns)
"""What the end of a key says that the tensor is."""

FOREIGN: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\.hada_", "LoHa"),
        (r"\.lokr_", "LoKr"),
        (r"\.lora_mid\.weight$", "LoCon with a Tucker core (lora_mid)"),
        (r"\.oft_", "OFT"),
        (r"\.(a1|a2|b1|b2)\.weight$", "GLoRA"),
        (r"\.on_input$", "IA3"),
        (r"\.diff(_b)?$", "full weight differences"),
        (r"^bundle_emb\.|\.string_to_param", "pivotal tuning with embeddings"),
        (r"new_concept_embedding", "ED-LoRA"),
        (r"_lora_embedding_|\.lora_embedding_[AB]", "LoRA on an embedding table"),
        (r"\.processor\.(qkv|proj)_lora[12]\.", "Flux LoRA of XLabs"),
        (r"^lora_unet_(double|single)_blocks_", "Flux LoRA of kohya"),
        (r"^lora_unet_joint_blocks_", "SD3 LoRA of kohya"),
        (r"^(diffusion_model\.)?(double|single)_blocks\.", "Flux LoRA in Black Forest Labs' names"),
        (r"^diffusion_model\.", "LoRA in ComfyUI's names"),
        (r"\.lora_B\.bias$", "LoRA with a bias"),
        (r"\.vera_lambda", "VeRA"),
    )
)
"""Known formats that are not read (yet)."""

KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
"""kohya's prefix -> component."""


def split_role(key: str) -> tuple[str, Role] | None:
    """``(module with its prefix, role)`` of a key, or None if it is not a LoRA key."""
    for pattern, role in ROLES:
        match = pattern.search(key)
        if match:
            return key[: match.start()], role
    return None


def split_component(module: str) -> tuple[str, str]:
    """``(component, module path)``; the component is empty when the key does not say it."""
    first, _, rest = module.partition(".")
    if first in COMPONENTS:
        return first, modern_name(rest)
    return "", modern_name(module)


def modern_name(module: str) -> str:
    """Old diffusers module names as today's: ``attn1.processor.to_out`` -> ``attn1.to_out.0``."""
    old_processor = ".processor." in module
    module = module.replace(".processor.", ".")
    if old_processor and module.endswith(".to_out"):
        return f"{module}.0"
    if ".self_attn.to_" in module:  # text encoders before PEFT
        return re.sub(r"\.self_attn\.to_(q|k|v|out)$", lambda m: f".self_attn.{m[1]}_proj", module)
    return module


def guess_component(modules: Iterable[str]) -> str:
    """Which component unprefixed module paths belong to, by names that only occur in one of them."""
    names = " ".join(modules)
    if re.search(r"\b(down_blocks|mid_block|up_blocks)\.", names):
        return "unet"
    if re.search(r"\b(single_)?transformer_blocks\.", names):
        return "transformer"
    if re.search(r"\bencoder\.layers\.", names):
        return "text_encoder"
    return ""


def refuse_foreign(keys: Iterable[str], source: str) -> None:
    """Raise :class:`InputError` naming the format if any key belongs to one we do not read."""
    for key in keys:
        for pattern, name in FOREIGN:
            if pattern.search(key):
                raise InputError(
                    f"{source} is in the format '{name}' (key '{key}'), which is not read yet; "
                    "readable are LoRA and DoRA as PEFT directories, diffusers and kohya files."
                )


def layer_of(parts: Mapping[Role, Tensor], alpha: float, rslora: bool, name: str, source: str) -> LoraLayer:
    """Build a layer from its tensors, checking that they belong together.

    Raises:
        InputError: a half is missing, or the ranks of A and B differ.
    """
    missing = [half for half in ("A", "B") if half not in parts]
    if missing:
        raise InputError(f"{source}: layer '{name}' has no {' and no '.join(missing)} matrix.")
    down, up = parts["A"], parts["B"]
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or down.shape[0] != up.shape[1] or down.shape[0] == 0:
        raise InputError(
            f"{source}: in layer '{name}' A {tuple(down.shape)} and B {tuple(up.shape)} do not multiply to an update."
        )
    if up.ndim == 4 and up.shape[2:] != (1, 1):
        raise InputError(f"{source}: in layer '{name}' B has a kernel {tuple(up.shape[2:])}; only 1 x 1 is LoRA.")
    magnitude = parts.get("magnitude")
    if magnitude is not None:
        if magnitude.numel() != up.shape[0]:
            raise InputError(
                f"{source}: the DoRA magnitude of '{name}' has {magnitude.numel()} numbers for {up.shape[0]} outputs; "
                "only magnitudes per output are supported."
            )
        magnitude = magnitude.flatten()
    return LoraLayer(down, up, alpha, rslora, magnitude)
