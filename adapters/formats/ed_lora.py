"""ED-LoRA files of Mix-of-Show (arXiv 2305.18292): a LoRA and, for each concept word, one embedding per layer.

A checkpoint is ``{"params": {"new_concept_embedding": {word: (layers, width)}, "text_encoder": {..}, "unet": {..}}}``.
Each cross-attention layer, in the order down, middle, up, reads the prompt with its own embedding of the word. There
are two spellings of the keys: ``to_k.lora_down.weight`` and, older (LoRA-Composer's program),
``to_k_lora.down.weight``. A layer's update is  alpha * up @ down  *without* division by the rank, so as a PEFT adapter
its alpha is alpha * r.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters import files
from adapters.errors import InputError
from adapters.formats.keys import layer_of, modern_name
from adapters.formats.lora import LoraFile, LoraLayer
from adapters.formats.tensors import PICKLED, check_finite, sha256

EMBEDDINGS = "new_concept_embedding"
_KEY = re.compile(r"^(.+?)(?:\.lora_(down|up)|_lora\.(down|up))\.weight$")
_PARTS = ("unet", "text_encoder")


def read_ed_lora(path: Path, alpha: float = 1.0) -> LoraFile | None:
    """The adapter in an ED-LoRA checkpoint, its words in ``embeddings``; None for a file of another kind.

    Args:
        alpha: multiplier of every update (1 in training, 0.6 to 1 in use).

    Raises:
        InputError: keys that are no ED-LoRA's, halves that are missing, numbers that are not finite, words whose
            embeddings differ in number.
    """
    if path.suffix not in PICKLED:
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds for what is not a checkpoint
        return None  # the general reader says what is wrong with it
    params = content.get("params", content.get("params_ema")) if isinstance(content, dict) else None
    if not isinstance(params, dict) or EMBEDDINGS not in params:
        return None
    source = f"'{path.name}'"
    words = _words(params[EMBEDDINGS], source)
    parts = {part: _layers(params[part], part, alpha, source) for part in _PARTS if params.get(part)}
    if not any(parts.values()):
        raise InputError(f"{source} holds no LoRA layers.")
    return LoraFile(parts, "ed-lora", path=path, sha256=sha256(path), embeddings=words)


def write_ed_lora(file: LoraFile, path: Path) -> Path:
    """Write ``file`` as an ED-LoRA checkpoint (today's spelling, alpha 1); returns ``path``.

    Raises:
        InputError: it has no words with an embedding per layer, or layers that the format does not know.
    """
    if not file.embeddings:
        raise InputError("An ED-LoRA file holds words with an embedding per layer, and this adapter has none.")
    params: dict[str, Any] = {EMBEDDINGS: {word: rows.clone() for word, rows in file.embeddings.items()}}
    for part in _PARTS:
        params[part] = {}
        for module, layer in file.parts.get(part, {}).items():
            if layer.magnitude is not None:
                raise InputError(f"The layer '{part}.{module}' is DoRA, which an ED-LoRA file cannot hold.")
            name = module if part == "unet" or module.startswith("text_model.") else f"text_model.{module}"
            params[part][f"{name}.lora_down.weight"] = layer.A.clone()
            params[part][f"{name}.lora_up.weight"] = layer.B * layer.scale
    others = set(file.parts) - set(_PARTS)
    if others:
        raise InputError(f"An ED-LoRA file has no place for {', '.join(sorted(others))}.")
    return files.write(path, lambda part: torch.save({"params": params}, part))


def _words(given: Any, source: str) -> dict[str, Tensor]:
    if not isinstance(given, dict) or not given:
        raise InputError(f"{source}: '{EMBEDDINGS}' holds no words.")
    words: dict[str, Tensor] = {}
    for word, rows in given.items():
        if not isinstance(rows, Tensor) or rows.ndim != 2:
            raise InputError(f"{source}: the embedding of '{word}' must be (layers, width).")
        words[str(word)] = rows
    if len({tuple(rows.shape) for rows in words.values()}) > 1:
        raise InputError(f"{source}: its words have embeddings of different shapes.")
    check_finite(words, source)
    return words


def _layers(tensors: Any, part: str, alpha: float, source: str) -> dict[str, LoraLayer]:
    if not isinstance(tensors, Mapping):
        raise InputError(f"{source}: its part '{part}' is no table of tensors.")
    check_finite(dict(tensors), source)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise InputError(f"{source}: the key '{part}.{key}' is no ED-LoRA's.")
        module = modern_name(match.group(1).replace(".processor.", "."))
        if module.endswith(".to_out"):
            module += ".0"
        halves.setdefault(module, {})["A" if "down" in match.groups() else "B"] = tensor
    made = {}
    for module, pair in halves.items():
        rank = pair["A"].shape[0] if "A" in pair else 1
        made[module] = layer_of(pair, alpha * rank, False, f"{part}.{module}", source)  # type: ignore[arg-type]
    return made
