"""Synthetic adapter files in several formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def diffusers_lora(path: Path, rank: int = 4, width: int = 768, seed: int = 0, **metadata: str) -> Path:
    """A UNet LoRA of two layers as diffusers writes it."""
    random = np.random.default_rng(seed)
    tensors = {}
    for module, inside in ((f"unet.{BLOCK}.attn2.to_k", width), (f"unet.{BLOCK}.attn1.to_out.0", 320)):
        tensors[f"{module}.lora_A.weight"] = random.normal(size=(rank, inside)).astype("f4")
        tensors[f"{module}.lora_B.weight"] = random.normal(size=(320, rank)).astype("f4")
    save_file(tensors, path, metadata=metadata or None)
    return path


def kohya_lora(path: Path, rank: int = 8, width: int = 2048) -> Path:
    """A UNet and text encoder LoRA as kohya's programs write it."""
    names = {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": width,
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj": 640,
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": 768,
    }
    tensors = {}
    for name, inside in names.items():
        tensors[f"{name}.lora_down.weight"] = np.ones((rank, inside), "f4")
        tensors[f"{name}.lora_up.weight"] = np.ones((640, rank), "f4")
        tensors[f"{name}.alpha"] = np.array(4.0, "f4")
    save_file(tensors, path)
    return path


def peft_lora(folder: Path, rank: int = 2) -> Path:
    """A PEFT directory."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    module = f"base_model.model.{BLOCK}.attn2.to_q"
    tensors = {
        f"{module}.lora_A.weight": np.ones((rank, 320), "f4"),
        f"{module}.lora_B.weight": np.ones((320, rank), "f4"),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
