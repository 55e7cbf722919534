"""Which base family an adapter file belongs to and which modules it changes, from its header alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

from adapters.formats.header import Header
from pipelines.diffusion.families import IN_BLOCKS, of_adapter

_END = 100
"""How many letters at the end of a flat name are searched for the module's own name."""


def adapter_family(head: Header) -> str:
    """The name of the family, "language", "vision-language", "speech", or "unknown"."""
    names = "\n".join(head.shapes)
    if _SPEECH.search(names):
        return "speech"
    if _VISION_LANGUAGE.search(names):
        return "vision-language"
    if _LANGUAGE.search(names):
        return "language"
    hints = " ".join(head.metadata.get(key, "")[:1000] for key in ("modelspec.architecture", "ss_base_model_version"))
    family = of_adapter(head.shapes, _inputs(head, _CONTEXT), hints, _inputs(head, IN_BLOCKS))
    return family.name if family else "unknown"


_LANGUAGE = re.compile(
    r"^base_model\.model\.(model\.layers\.\d|(model\.)?(transformer|gpt_neox|backbone)\.(h|layers)\.\d|"
    r"(bert|roberta|distilbert|deberta|electra|albert|model)\.(encoder\.layer|transformer\.layer|layers)\b)",
    re.MULTILINE,
)
"""PEFT's keys of decoders and of BERT-like models; speech models have encoder.layers and decoder.layers instead."""

_VISION_LANGUAGE = re.compile(
    r"^base_model\.model\.(model\.)?(language_model|text_model)\.(model\.)?layers\.\d", re.MULTILINE
)
"""PEFT's keys of the language model inside a vision-language model."""

_SPEECH = re.compile(
    r"^base_model\.model\.(model\.)?(encoder|decoder)\.layers\.\d+\.(self_attn|encoder_attn|fc[12])\b", re.MULTILINE
)
"""PEFT's keys of Whisper's encoder and decoder."""

_CONTEXT = re.compile(r"attn2[._](processor\.)?to_[kv]$")
"""Projections of the text embeddings in cross-attention."""


def _inputs(head: Header, wanted: re.Pattern[str]) -> int | None:
    """Number of inputs of a layer whose name ends so."""
    for module, parts in head.layers.items():
        shape = parts.get("A", ())
        if len(shape) == 2 and wanted.search(module[-_END:]):
            return shape[1]
    return None


_FLAT_COMPONENT = re.compile(r"lora_(unet|transformer|te\d?)_")
_COMPONENTS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}
_FLAT_LEAF = re.compile(
    r"_(to_out\.0|to_add_out|to_[qkv]|to_out|add_[qkv]_proj|[qkv]_proj|out_proj|proj_in|proj_out|fc[12]|ff_net_0_proj|"
    r"ff_net_2|conv_in|conv_out|conv_shortcut|conv\d?|time_emb_proj|img_attn_\w+|txt_attn_\w+|img_mlp_\d|txt_mlp_\d|"
    r"linear_?\d)$"
)


def targets(modules: Iterable[str]) -> tuple[str, ...]:
    """The modules changed, as ``component.module``, each once."""
    return tuple(sorted({_target(module) for module in modules}))


def _target(module: str) -> str:
    flat = _FLAT_COMPONENT.match(module)
    if flat:
        component = _COMPONENTS.get(flat.group(1), flat.group(1))
        module = re.sub(r"(to_out)_0$", r"\1.0", module[flat.end() :][-_END:])
        known = _FLAT_LEAF.search(module)
        return f"{component}.{known.group(1) if known else module}"
    module = module.removeprefix("base_model.model.").replace(".processor", "")
    component, _, rest = module.partition(".")
    if component not in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        component, rest = "model", module
    parts = rest.split(".")
    leaf = ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
    return f"{component}.{leaf}"
