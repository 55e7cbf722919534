"""Modules of SD3, Flux and Flux.2 translated from their authors' names to diffusers'.

Kohya, ComfyUI, XLabs, fal and BFL write adapters for the original modules, which fuse layers that diffusers separates:

    qkv       (3 h, h)        rows of q, k and v             -> three layers
    linear1   (3 h + m, h)    rows of q, k, v and the MLP    -> four layers (Flux.2: one)
    adaLN of the last layer   rows of shift, then scale      -> diffusers has scale first

An update is split by rows: B is split, A is shared. Where a fused layer holds one LoRA per part (a block-diagonal B),
zero columns are dropped, so each part gets its own rank back. Dots and underscores are treated alike, since kohya
writes only underscores.

Flux and Flux.2 have blocks of the same names, which are other modules in diffusers; they differ in the width of their
feed-forward layers (m = 4 h and 6 h) and in modulations (one per block, or shared by all).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from adapters.errors import InputError
from adapters.formats.lora import LoraLayer

if TYPE_CHECKING:
    from torch import Tensor

_START = re.compile(r"(double_blocks|single_blocks|joint_blocks)_\d+_")
_SELF = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

_INSIDE: dict[str, dict[str, tuple[str, ...]]] = {
    "double_blocks": {
        "img_mod_lin": ("norm1.linear",),
        "img_attn_qkv": _SELF,
        "img_attn_proj": ("attn.to_out.0",),
        "img_mlp_0": ("ff.net.0.proj",),
        "img_mlp_2": ("ff.net.2",),
        "txt_mod_lin": ("norm1_context.linear",),
        "txt_attn_qkv": _ADDED,
        "txt_attn_proj": ("attn.to_add_out",),
        "txt_mlp_0": ("ff_context.net.0.proj",),
        "txt_mlp_2": ("ff_context.net.2",),
        "qkv_lora1": _SELF,  # XLabs
        "qkv_lora2": _ADDED,
        "proj_lora1": ("attn.to_out.0",),
        "proj_lora2": ("attn.to_add_out",),
    },
    "single_blocks": {
        "modulation_lin": ("norm.linear",),
        "linear1": (*_SELF, "proj_mlp"),
        "linear2": ("proj_out",),
        "qkv": _SELF,  # XLabs
        "proj": ("proj_out",),
    },
    "joint_blocks": {
        "x_block_adaLN_modulation_1": ("norm1.linear",),
        "x_block_attn_qkv": _SELF,
        "x_block_attn_proj": ("attn.to_out.0",),
        "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "x_block_attn2_proj": ("attn2.to_out.0",),
        "x_block_mlp_fc1": ("ff.net.0.proj",),
        "x_block_mlp_fc2": ("ff.net.2",),
        "context_block_adaLN_modulation_1": ("norm1_context.linear",),
        "context_block_attn_qkv": _ADDED,
        "context_block_attn_proj": ("attn.to_add_out",),
        "context_block_mlp_fc1": ("ff_context.net.0.proj",),
        "context_block_mlp_fc2": ("ff_context.net.2",),
    },
}
_FLUX2: dict[str, tuple[str, ...]] = {
    "img_attn_qkv": _SELF,
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.linear_in",),
    "img_mlp_2": ("ff.linear_out",),
    "txt_attn_qkv": _ADDED,
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.linear_in",),
    "txt_mlp_2": ("ff_context.linear_out",),
    "linear1": ("attn.to_qkv_mlp_proj",),
    "linear2": ("attn.to_out",),
}
"""Inside the double and single blocks of Flux.2."""

_BLOCKS = {
    "double_blocks": "transformer_blocks",
    "single_blocks": "single_transformer_blocks",
    "joint_blocks": "transformer_blocks",
}
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "context_embedder": "context_embedder",
    "x_embedder_proj": "pos_embed.proj",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}
_OUTSIDE_FLUX2 = {
    name: module.replace("time_text_embed", "time_guidance_embed")
    for name, module in _OUTSIDE.items()
    if not name.startswith(("vector_in", "y_embedder", "t_embedder", "x_embedder", "context_embedder"))
} | {
    "single_stream_modulation_lin": "single_stream_modulation.linear",
    "double_stream_modulation_img_lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt_lin": "double_stream_modulation_txt.linear",
}


_APPROXIMATOR = re.compile(r"distilled_guidance_layer_(?:(in_proj|out_proj)|layers_(\d+)_(in|out)_layer)$")
"""Layers of Chroma's network for modulations."""

_SHARED = re.compile(r"(single|double)_stream_modulation_")
"""Modulations that all blocks of Flux.2 share."""


def is_original(module: str) -> bool:
    """True for a block of SD3, Flux or Flux.2 in its authors' names (dotted or flat)."""
    flat = module.replace(".", "_")
    return bool(_START.match(flat) or (_SHARED.match(flat) and "_lin" in flat))


def is_flux2(shapes: Mapping[str, tuple[int, int]]) -> bool:
    """True if modules of these names and shapes (outputs, inputs) are Flux.2's and not Flux's; False if undecided
    (then the names mean the same in both)."""
    for written, (outputs, inputs) in shapes.items():
        flat = written.replace(".", "_")
        if _SHARED.search(flat):
            return True
        if re.search(r"_blocks_\d+_((img|txt)_mlp_0|linear1)$", flat):
            return outputs == (9 if flat.endswith("linear1") else 6) * inputs
        if re.search(r"_blocks_\d+_((img|txt)_mlp_2|linear2)$", flat):
            return inputs == (4 if flat.endswith("linear2") else 3) * outputs
    return False


def is_flux(modules: Mapping[str, LoraLayer]) -> bool:
    """True if these modules are Flux's or Flux.2's."""
    return any(name.replace(".", "_").startswith(("double_blocks_", "single_blocks_")) for name in modules)


def renamed(layers: Mapping[str, LoraLayer], source: str) -> dict[str, LoraLayer]:
    """``layers`` of the denoiser with diffusers' module names.

    Raises:
        InputError: a module that neither SD3 nor Flux has, rows that cannot be split, or two layers for one module.
    """
    made: dict[str, LoraLayer] = {}
    flux2 = is_flux2({name: (layer.B.shape[0], layer.A.shape[1]) for name, layer in layers.items()})
    for written, layer in layers.items():
        for name, part in _parts(written, layer, source, flux2).items():
            if name in made:
                raise InputError(f"{source}: two layers for the module '{name}'.")
            made[name] = part
    return made


def _parts(written: str, layer: LoraLayer, source: str, flux2: bool) -> dict[str, LoraLayer]:
    flat, outside = written.replace(".", "_"), _OUTSIDE_FLUX2 if flux2 else _OUTSIDE
    if flat in outside:
        name = outside[flat]
        return {name: swapped(layer) if name == "norm_out.linear" else layer}
    if found := _APPROXIMATOR.match(flat):
        inside = found[1] or f"layers.{int(found[2])}.linear_{1 if found[3] == 'in' else 2}"
        return {f"distilled_guidance_layer.{inside}": layer}
    kind, _, rest = flat.partition("_blocks_")
    number, _, inner = rest.partition("_")
    targets = _FLUX2.get(inner) if flux2 else _INSIDE.get(f"{kind}_blocks", {}).get(inner)
    if targets is None or not number.isdigit():
        family = "Flux.2 has no" if flux2 else "neither SD3 nor Flux has a"
        raise InputError(f"{source}: {family} module '{written}' that can be adapted.")
    block = f"{_BLOCKS[f'{kind}_blocks']}.{int(number)}"
    if targets == ("norm1_context.linear",) and layer.B.shape[0] == 2 * layer.A.shape[1]:
        layer = swapped(layer)  # SD3's last block only shifts and scales its text
    pieces = [layer] if len(targets) == 1 else _split(layer, len(targets), written, source)
    return {f"{block}.{target}": piece for target, piece in zip(targets, pieces, strict=True)}


def _split(layer: LoraLayer, count: int, written: str, source: str) -> list[LoraLayer]:
    """One layer per group of rows: q, k and v of h rows each and, with ``count`` 4, the remaining rows."""
    rows, hidden = layer.B.shape[0], layer.A.shape[1]
    sizes = [rows // 3] * 3 if count == 3 else [hidden, hidden, hidden, rows - 3 * hidden]
    if layer.A.ndim != 2 or sum(sizes) != rows or min(sizes) < 1:
        raise InputError(
            f"{source}: '{written}' joins {count} layers, but {rows} rows for {hidden} inputs cannot be split so."
        )
    magnitudes = [None] * count if layer.magnitude is None else list(layer.magnitude.split(sizes))
    return [
        _trimmed(replace(layer, B=B, magnitude=magnitude))
        for B, magnitude in zip(layer.B.split(sizes), magnitudes, strict=True)
    ]


def _trimmed(layer: LoraLayer) -> LoraLayer:
    """``layer`` without the zero columns of B, at the same scale; unchanged if all are zero."""
    used: Tensor = layer.B.flatten(2).ne(0).any(2).any(0) if layer.B.ndim > 2 else layer.B.ne(0).any(0)
    if bool(used.all()) or not bool(used.any()):
        return layer
    rank = int(used.sum())
    alpha = layer.scale * (rank**0.5 if layer.rslora else rank)
    return replace(layer, A=layer.A[used], B=layer.B[:, used].contiguous(), alpha=alpha)


def swapped(layer: LoraLayer) -> LoraLayer:
    """Rows [shift, scale] reordered to [scale, shift]."""

    import torch

    def swap(tensor: Tensor) -> Tensor:
        shift, scale = tensor.chunk(2)
        return torch.cat([scale, shift])

    return replace(layer, B=swap(layer.B), magnitude=None if layer.magnitude is None else swap(layer.magnitude))
