"""ED-LoRA files of Mix-of-Show (arXiv 2305.18292): a LoRA and, for each concept word, one embedding per layer.

A checkpoint is ``{"params": {"new_concept_embedding": {word: (layers, width)}, "text_encoder": {..}, "unet": {..}}}``.
Each cross-attention layer, in the order down, middle, up, reads the prompt with its own embedding of the word. Keys
have two spellings: ``to_k.lora_down.weight`` and the older ``to_k_lora.down.weight`` (LoRA-Composer's code). A layer's
update is  alpha * up @ down  *without* division by the rank, so as a PEFT adapter its alpha is alpha * r.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import files
from adapters.errors import InputError
from adapters.formats.format import Format
from adapters.formats.keys import layer_of, modern_name
from adapters.formats.lora import LoraFile, LoraLayer

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats.header import Header

EMBEDDINGS = "new_concept_embedding"
_KEY = re.compile(r"^(.+?)(?:\.lora_(down|up)|_lora\.(down|up))\.weight$")
_PARTS = ("unet", "text_encoder")


class EdLora(Format):
    """A pickle of nested tables of tensors, read and written with alpha 1 (the multiplier of every update)."""

    name, title, suffix, order = "ed-lora", "Mix-of-Show, LoRA-Composer", ".pth", 5

    def recognises(self, head: Header) -> bool:
        return _params(head) is not None

    def read(self, head: Header, alpha: float = 1.0) -> LoraFile:
        params, source = _params(head) or {}, f"'{head.path.name}'"
        words = _words(params[EMBEDDINGS], source)
        parts = {part: _layers(params[part], part, alpha, source) for part in _PARTS if params.get(part)}
        if not any(parts.values()):
            raise InputError(f"{source} holds no LoRA layers.")
        return LoraFile(parts, "ed-lora", path=head.path, embeddings=words)

    def refusal(self, file: LoraFile) -> str:
        if not file.embeddings:
            return "An ED-LoRA file holds words with an embedding per layer, but this adapter has none."
        for component, module, layer in file.layers():
            if layer.magnitude is not None:
                return f"The layer '{component}.{module}' is DoRA, which an ED-LoRA file cannot hold."
        others = set(file.parts) - set(_PARTS)
        return f"An ED-LoRA file cannot hold {', '.join(sorted(others))}." if others else ""

    def _write(self, file: LoraFile, path: Path, metadata: Mapping[str, str]) -> Path:
        """In the current spelling of the keys; the format has no text metadata."""
        import torch

        params: dict[str, Any] = {EMBEDDINGS: {word: rows.clone() for word, rows in file.embeddings.items()}}
        for part in _PARTS:
            params[part] = {}
            for module, layer in file.parts.get(part, {}).items():
                name = module if part == "unet" or module.startswith("text_model.") else f"text_model.{module}"
                params[part][f"{name}.lora_down.weight"] = layer.A.clone()
                params[part][f"{name}.lora_up.weight"] = layer.B * layer.scale
        return files.write(path, lambda part: torch.save({"params": params}, part))


def _params(head: Header) -> dict[str, Any] | None:
    content = head.content
    params = content.get("params", content.get("params_ema")) if isinstance(content, dict) else None
    return params if isinstance(params, dict) and EMBEDDINGS in params else None


def _words(given: Any, source: str) -> dict[str, Tensor]:
    from torch import Tensor

    from adapters.formats.tensors import check_finite

    if not isinstance(given, dict) or not given:
        raise InputError(f"{source}: '{EMBEDDINGS}' contains no words.")
    words: dict[str, Tensor] = {}
    for word, rows in given.items():
        if not isinstance(rows, Tensor) or rows.ndim != 2:
            raise InputError(f"{source}: the embedding of '{word}' must be (layers, width).")
        words[str(word)] = rows
    if len({tuple(rows.shape) for rows in words.values()}) > 1:
        raise InputError(f"{source}: the embeddings of its words differ in shape.")
    check_finite(words, source)
    return words


def _layers(tensors: Any, part: str, alpha: float, source: str) -> dict[str, LoraLayer]:
    from adapters.formats.tensors import check_finite

    if not isinstance(tensors, Mapping):
        raise InputError(f"{source}: its part '{part}' is not a table of tensors.")
    check_finite(dict(tensors), source)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise InputError(f"{source}: the key '{part}.{key}' is not an ED-LoRA key.")
        module = modern_name(match.group(1).replace(".processor.", "."))
        if module.endswith(".to_out"):
            module += ".0"
        halves.setdefault(module, {})["A" if "down" in match.groups() else "B"] = tensor
    made = {}
    for module, pair in halves.items():
        rank = pair["A"].shape[0] if "A" in pair else 1
        made[module] = layer_of(pair, alpha * rank, False, f"{part}.{module}", source)
    return made


FORMAT = EdLora()
write_ed_lora = FORMAT.write
