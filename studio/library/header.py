"""What the head of a safetensors file says: names and shapes of tensors and the metadata, nothing of the weights."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import InputError
from pipelines.diffusion.families import of_adapter

Shapes = dict[str, tuple[int, ...]]

_LIMIT = 100_000_000  # bytes, the limit of the format's own readers


@dataclass(frozen=True)
class Header:
    """Tensors by name with their shapes, and the file's text metadata."""

    shapes: Shapes
    metadata: dict[str, str]


def read(path: Path) -> Header:
    """Read the head of ``path``; raises :class:`InputError` saying what is wrong with the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_LIMIT, size - 8):
            raise InputError("not a safetensors file, or cut off" if size else "empty file")
        try:
            head = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
            raise InputError("not a safetensors file: its head is not JSON") from None
    try:
        metadata = {str(key): str(value) for key, value in head.pop("__metadata__", {}).items()}
        shapes = {name: tuple(int(side) for side in entry["shape"]) for name, entry in head.items()}
        end = max((int(entry["data_offsets"][1]) for entry in head.values()), default=0)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise InputError("not a safetensors file: its head lacks shapes or offsets") from None
    if 8 + length + end != size:
        raise InputError(f"cut off or damaged: {size} bytes instead of {8 + length + end}")
    return Header(shapes, metadata)


_DOWN = re.compile(r"(.*?)[._](?:lora_A|lora_down|lora\.down|lora_linear_layer\.down|\w+_lora[12]?\.down)"
                   r"(?:\.[\w-]+)?\.weight$")  # fmt: skip
_OTHER = {"hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "dora_scale": "DoRA",
          "lora_magnitude_vector": "DoRA", "diff": "difference"}  # fmt: skip


def ranks(shapes: Shapes) -> Counter[int]:
    """How many layers have which rank."""
    return Counter(shape[0] for name, shape in shapes.items() if _DOWN.match(name) and len(shape) in (2, 4))


def algorithm(shapes: Shapes) -> str:
    """ "LoRA", "DoRA", "LoHa", "LoKr", or empty when the tensors are none of these."""
    for name in shapes:
        for mark, algorithm_name in _OTHER.items():
            if mark in name.rsplit(".", 2)[-2:] or name.endswith(mark):
                return algorithm_name
    return "LoRA" if ranks(shapes) else ""


def adapter_format(shapes: Shapes) -> str:
    """The naming scheme: "kohya", "peft", "diffusers" ..."""
    names = list(shapes)
    if any(name.startswith(("lora_unet_", "lora_te", "lora_transformer_")) for name in names):
        return "kohya"
    if any(name.startswith("base_model.model.") for name in names):
        return "peft"
    if any(name.startswith(("diffusion_model.", "text_encoders.")) for name in names):
        return "comfyui"
    if any(".processor." in name for name in names):
        return "attention processors"
    return "diffusers" if any(_DOWN.match(name) for name in names) else "other"


def adapter_family(header: Header) -> str:
    """The family of base models an adapter belongs to, judged by module names and widths."""
    names = "\n".join(header.shapes)
    if _LANGUAGE.search(names):
        return "language"
    hints = " ".join(header.metadata.get(key, "") for key in ("modelspec.architecture", "ss_base_model_version"))
    family = of_adapter(header.shapes, _context_width(header.shapes), hints)
    return family.name if family else "unknown"


_LANGUAGE = re.compile(
    r"^base_model\.model\.(model\.layers\.\d|(model\.)?(transformer|gpt_neox|backbone)\.(h|layers)\.\d|"
    r"(bert|roberta|distilbert|deberta|electra|albert|model)\.(encoder\.layer|transformer\.layer|layers)\b)",
    re.MULTILINE,
)
"""PEFT's keys of decoders and of BERT's family; speech models have encoder.layers and decoder.layers instead."""


def _context_width(shapes: Shapes) -> int | None:
    """Width of the text embeddings, from a cross-attention key projection."""
    for name, shape in shapes.items():
        if re.search(r"attn2[._]to_[kv]\b", name.replace("_lora", ".lora")) and _DOWN.match(name) and len(shape) == 2:
            return shape[1]
    return None


_KOHYA_COMPONENT = re.compile(r"lora_(unet|transformer|te\d?)_")
_COMPONENTS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}
_KOHYA_LEAF = re.compile(
    r"_(to_out\.0|to_add_out|to_[qkv]|to_out|add_[qkv]_proj|[qkv]_proj|out_proj|proj_in|proj_out|fc[12]|ff_net_0_proj|"
    r"ff_net_2|conv_in|conv_out|conv_shortcut|conv\d?|time_emb_proj|img_attn_\w+|txt_attn_\w+|img_mlp_\d|txt_mlp_\d|"
    r"linear_?\d)$"
)


def targets(shapes: Shapes) -> tuple[str, ...]:
    """The modules changed, as ``component.module``, each once."""
    found = set()
    for name in shapes:
        match = _DOWN.match(name)
        if match:
            found.add(_target(match.group(1)))
    return tuple(sorted(found))


def _target(module: str) -> str:
    kohya = _KOHYA_COMPONENT.match(module)
    if kohya:
        component = _COMPONENTS.get(kohya.group(1), kohya.group(1))
        module = re.sub(r"(to_out)_0$", r"\1.0", module[kohya.end() :])
        known = _KOHYA_LEAF.search(module)
        return f"{component}.{known.group(1) if known else module}"
    module = module.removeprefix("base_model.model.").replace(".processor", "")
    component, _, rest = module.partition(".")
    if component not in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        component, rest = "model", module
    parts = rest.split(".")
    leaf = ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
    return f"{component}.{leaf}"


def metadata_json(header: Header, key: str) -> dict[str, Any] | None:
    """A metadata value that is a JSON object, else None."""
    try:
        value = json.loads(header.metadata.get(key, ""))
    except (json.JSONDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
