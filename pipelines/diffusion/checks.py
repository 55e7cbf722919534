"""Checks before adapters are composed on a pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from adapters.errors import InputError, nearest


def check_pristine(pipe: Any, components: Iterable[str]) -> None:
    """Refuse a pipeline that already has other adapters, or on which hooks would not work.

    Raises:
        InputError: fused LoRAs, PEFT adapters, fused query-key-value projections (LoRA on them would be ignored), or a
            compiled model (it may ignore hooks that are added later).
    """
    if getattr(pipe, "_merged_adapters", None):
        raise InputError(
            "LoRAs are fused into this pipeline: call its unfuse_lora() (or load it again) before composing."
        )
    for component in components:
        model = getattr(pipe, component, None)
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            raise InputError(
                f"The {component} of this pipeline is compiled, and compiled code may ignore adapters added later: "
                "use an uncompiled pipeline."
            )
        for module in model.modules() if isinstance(model, nn.Module) else ():
            own = vars(module)  # looking up a missing attribute of a module is slow
            if own.get("merged_adapters"):
                raise InputError("LoRAs are fused into this pipeline: call its unfuse_lora() before composing.")
            if "base_layer" in own["_modules"] and "lora_A" in own["_modules"]:
                raise InputError(
                    "This pipeline already has adapters of its own: call its unload_lora_weights() and load them here "
                    "with load_lora()."
                )
            if own.get("fused_projections"):
                raise InputError(
                    "The query, key and value layers of this pipeline are fused, so adapters on them would be ignored: "
                    "call its unfuse_qkv_projections() before composing."
                )


def check_weight(value: float, what: str) -> float:
    """``value`` as a finite float.

    Raises:
        InputError: not a finite number.
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{what} must be a finite number, got {value!r}.")
    return float(value)


def check_blocks(blocks: Mapping[str, float], modules: Mapping[str, Iterable[str]], denoiser: str) -> dict[str, float]:
    """The factors by full prefix ("unet.down_blocks.1"), each of which matches at least one layer.

    Raises:
        InputError: a prefix that matches no layer of the adapter, or a factor that is not finite.
    """
    full = [f"{component}.{name}" for component, names in modules.items() for name in names]
    checked = {}
    for prefix, factor in blocks.items():
        check_weight(factor, f"The factor of block '{prefix}'")
        known = prefix.partition(".")[0] in modules
        path = prefix if known else f"{denoiser}.{prefix}"
        if not any(begins(name, path) for name in full):
            heads = sorted({".".join(name.split(".")[1:length]) for name in full for length in (2, 3)} - {""})
            raise InputError(f"No layer of this adapter is in the block '{prefix}'{nearest(prefix, heads)}.")
        checked[path] = float(factor)
    return checked


def begins(name: str, prefix: str) -> bool:
    """Whether the module path ``name`` is inside ``prefix`` (whole names: "blocks.10" is not inside "blocks.1")."""
    return name == prefix or name.startswith(f"{prefix}.")


def block_factor(name: str, blocks: Mapping[str, float]) -> float:
    """The factor of the longest prefix that contains ``name``; 1 if none does."""
    fitting = [prefix for prefix in blocks if begins(name, prefix)]
    return blocks[max(fitting, key=len)] if fitting else 1.0


def check_prompt(prompt: Any, what: str) -> None:
    """Raise :class:`InputError` unless ``prompt`` is a single text."""
    if not isinstance(prompt, str):
        raise InputError(
            f"{what} must be one text, got a {type(prompt).__name__}: call once per prompt (images=N makes several "
            "pictures of one)."
        )


def check_frames(family: Any, frames: int | None) -> int | None:
    """The number of frames of each video of a family; None for a family of pictures.

    Raises:
        InputError: the family makes no videos, or cannot make so many frames.
    """
    if family.video is None:
        if frames is not None:
            raise InputError(f"{family.title} makes pictures: leave frames out, or choose a base that makes videos.")
        return None
    checked: int = family.video.check(family.video.frames if frames is None else frames)
    return checked


def check_call(
    family: Any, pipe: Any, steps: int, guidance: float, images: int, size: tuple[int | None, int | None], seed: int
) -> None:
    """Check the numbers of a call.

    Raises:
        InputError: one is out of range; the message names it and what is possible.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}.")
    if steps == 1 and pipe.scheduler.config.get("shift_terminal"):
        raise InputError("The sampler of this base needs at least 2 steps, got 1.")
    if images < 1:
        raise InputError(f"images must be at least 1, got {images}.")
    if check_weight(guidance, "guidance_scale") < 0:
        raise InputError(f"guidance_scale must not be negative, got {guidance}.")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be in [0, 2^63), got {seed}.")
    step = family.pixel_step(pipe)
    for name, value in zip(("width", "height"), size, strict=True):
        if value is not None and (value < step or value % step):
            raise InputError(f"{name} must be a positive multiple of {step} for this model, got {value}.")
