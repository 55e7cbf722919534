"""The tiny Stable Diffusion as a single checkpoint in the original (LDM) key names, to test reading such files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in.": "input_blocks.0.0.",
    "down_blocks.0.resnets.0.": "input_blocks.1.0.",
    "down_blocks.0.attentions.0.": "input_blocks.1.1.",
    "down_blocks.0.downsamplers.0.conv.": "input_blocks.2.0.op.",
    "down_blocks.1.resnets.0.": "input_blocks.3.0.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "up_blocks.0.resnets.0.": "output_blocks.0.0.",
    "up_blocks.0.resnets.1.": "output_blocks.1.0.",
    "up_blocks.0.upsamplers.0.conv.": "output_blocks.1.1.conv.",
    "up_blocks.1.resnets.0.": "output_blocks.2.0.",
    "up_blocks.1.attentions.0.": "output_blocks.2.1.",
    "up_blocks.1.resnets.1.": "output_blocks.3.0.",
    "up_blocks.1.attentions.1.": "output_blocks.3.1.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
VAE = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.group_norm.": "mid.attn_1.norm.",
    "mid_block.attentions.0.to_q.": "mid.attn_1.q.",
    "mid_block.attentions.0.to_k.": "mid.attn_1.k.",
    "mid_block.attentions.0.to_v.": "mid.attn_1.v.",
    "mid_block.attentions.0.to_out.0.": "mid.attn_1.proj_out.",
    "conv_norm_out.": "norm_out.",
    "conv_shortcut.": "nin_shortcut.",
    "downsamplers.0.conv.": "downsample.conv.",
    "upsamplers.0.conv.": "upsample.conv.",
    "resnets.": "block.",
}


def save_single_file(pipe: Any, path: Path) -> Path:
    """Write ``pipe`` (the tiny "sd") as one file in the original names."""
    tensors: dict[str, Tensor] = {}
    for key, value in pipe.unet.state_dict().items():
        tensors[f"model.diffusion_model.{_unet_key(key)}"] = value
    for key, value in pipe.vae.state_dict().items():
        name = _vae_key(key)
        is_attention = "mid.attn_1" in name and name.endswith(".weight") and "norm" not in name
        tensors[f"first_stage_model.{name}"] = value[..., None, None] if is_attention else value
    for key, value in pipe.text_encoder.state_dict().items():
        old = key if key.startswith("text_model.") else f"text_model.{key}"
        tensors[f"cond_stage_model.transformer.{old}"] = value
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)
    return path


def _unet_key(key: str) -> str:
    ours, theirs = next((ours, theirs) for ours, theirs in UNET.items() if key.startswith(ours))
    rest = key.removeprefix(ours)
    if ".resnets." in ours:
        name, _, kind = rest.rpartition(".")
        rest = f"{RESNET[name]}.{kind}"
    return theirs + rest


def _vae_key(key: str) -> str:
    for ours, theirs in VAE.items():
        key = key.replace(ours, theirs)
    key = key.replace("down_blocks.", "down.")
    for i in (0, 1):  # the original counts the decoder's levels from the picture
        key = key.replace(f"up_blocks.{i}.", f"up.{1 - i}.")
    return key
