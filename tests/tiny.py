"""Tiny random pipelines of every family (:meth:`pipelines.diffusion.families.Family.tiny`), and adapters for them.

Weights are random but reproducible: ``seed`` decides them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from pipelines.diffusion import families
from pipelines.diffusion.families.miniature import (
    END,
    LETTERS,
    START,
    clip_config,
    clip_tokenizer,
    ddim,
    t5_tokenizer,
    unet,
    vae,
)

FAMILIES: Mapping[str, Callable[..., Any]] = {name: family.tiny for name, family in families.FAMILIES.items()}
"""Family name -> builder."""

PICTURES = {name: build for name, build in FAMILIES.items() if families.FAMILIES[name].video is None}
"""Those that make pictures; the others make videos."""

DRAWN_SMALL = tuple(name for name in PICTURES if name != "hidream")
"""Families that draw small pictures also when loaded from a file; HiDream has 128 x 128 cells at least."""

TRAINABLE = {name: build for name, build in FAMILIES.items() if not families.FAMILIES[name].untrainable}

sd, sdxl, sd3, flux = (FAMILIES[name] for name in ("sd", "sdxl", "sd3", "flux"))


def saved(family: str, folder: Path, seed: int = 0) -> Path:
    """Write the tiny pipeline of a family in diffusers' directory format and return its path."""
    path = folder / f"tiny-{family}-{seed}"
    FAMILIES[family](seed).save_pretrained(path)
    return path


def lora_file(
    pipe: Any,
    folder: Path,
    seed: int = 1,
    rank: int = 2,
    alpha: float = 4.0,
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0"),
    text_targets: tuple[str, ...] = ("q_proj", "v_proj"),
    strength: float = 0.5,
    **lora_config: Any,
) -> Path:
    """Save a random LoRA for ``pipe`` as a trainer does: PEFT layers, written by diffusers' own saver.

    ``targets`` are module name endings in the denoiser, ``text_targets`` in ``text_encoder`` (empty = none, as for a
    family whose files have no text encoder layers in diffusers). The pipeline is not changed (the layers are made on
    copies). Returns the written ``.safetensors`` file.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, Any] = {}
    models: dict[str, Any] = {}
    known = families.family_of(pipe).text_encoders
    of_text = text_targets if "text_encoder" in known and "text_encoder" in pipe._lora_loadable_modules else ()
    for name, wanted in {denoiser_name(pipe): targets, "text_encoder": of_text}.items():
        if not wanted:
            continue
        models[name] = model = copy.deepcopy(getattr(pipe, name))
        model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(wanted), **lora_config))
        for key, parameter in model.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = noise * strength / parameter[0].numel() ** 0.5
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
    pipe.save_lora_weights(folder, **layers, **_collate_lora_metadata(models))
    return folder / "pytorch_lora_weights.safetensors"


def denoiser_name(pipe: Any) -> str:
    """``unet`` or ``transformer``."""
    return "unet" if hasattr(pipe, "unet") else "transformer"


__all__ = [
    "DRAWN_SMALL", "END", "FAMILIES", "LETTERS", "PICTURES", "START", "TRAINABLE", "clip_config", "clip_tokenizer",
    "ddim", "denoiser_name", "flux", "lora_file", "saved", "sd", "sd3", "sdxl", "t5_tokenizer", "unet", "vae",
]  # fmt: skip
