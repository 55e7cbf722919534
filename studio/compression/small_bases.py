"""Pruned bases on disk: opening what is pruned, writing what is left as a transformers directory with its lineage."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters import files
from adapters.compression.slicing import members
from adapters.compression.storage import storage
from adapters.compression.structure import Pruning, reduction
from adapters.errors import InputError
from pipelines.language.loading import LanguageModel, open_model
from studio import devices, library, silence
from studio.compression import picture, ready
from studio.compression.pruning_schema import PruningConfig
from studio.training.cards import base_name, front_matter
from studio.training.schemas.language import TrainLanguageConfig

PICTURE = "kept.png"
"""In a job's folder: what is kept of every layer."""


def open_whole(config: PruningConfig) -> LanguageModel:
    """The base of ``config`` in floating point.

    Raises:
        InputError: another architecture, or a base that is quantised or pruned already.
    """
    ready.base_to_prune(config)
    place = library.resolve_language(config.base)
    base = open_model(
        place, dtype=config.dtype, device=torch.device(devices.resolve(config.device)), attention=config.attention
    )
    for name, _, _, module in members(base.model):
        if not isinstance(module, nn.Linear) or storage(module) or not module.weight.is_floating_point():
            raise InputError(f"The weight '{name}' of '{config.base}' is stored in few bits: prune the original.")
    return base


def write(model: Any, tokenizer: Any, pruning: Pruning, target: Path, config: TrainLanguageConfig, made: str) -> Path:
    """Write the small ``model`` as the directory ``target``, in the precision of its base's files; returns it.

    Args:
        made: a sentence for the card: how it came about.
    """
    dtype = stored_dtype(config) or next(model.parameters()).dtype
    model.config.use_cache = True
    with files.whole(target) as part, silence.no_bars():
        part.mkdir()
        model.to(dtype).save_pretrained(part)
        tokenizer.save_pretrained(part)
        pruning.write(part)
        if not pruning.mask:
            drawn = picture.kept(pruning)
            files.write(part / picture.FILE, lambda place: drawn.save(place, format="PNG"))
        files.write_text(part / "README.md", card(pruning, config, made))
    return target


def stored_dtype(config: TrainLanguageConfig) -> torch.dtype | None:
    """The precision named in the base's configuration."""
    place = Path(library.resolve_language(config.base)) / "config.json"
    if not place.is_file():
        return None
    plain = json.loads(place.read_text(encoding="utf-8"))
    found = getattr(torch, str(plain.get("dtype") or plain.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else None


def draw(pruning: Pruning, folder: Path) -> Path:
    """Write the picture of ``pruning`` into a job's folder."""
    drawn = picture.kept(pruning)
    return files.write(folder / PICTURE, lambda place: drawn.save(place, format="PNG"))


def card(pruning: Pruning, config: TrainLanguageConfig, made: str) -> str:
    """What the small base is, how it was made and who can open it."""
    found = reduction(pruning)
    share = found.small / found.whole
    heads = sorted({heads for heads, _ in pruning.counts()})
    channels = sorted({channels for _, channels in pruning.counts()})
    opened = (
        "It is an ordinary transformers directory: `AutoModelForCausalLM.from_pretrained` opens it."
        if pruning.uniform
        else "Its layers have different sizes, which `pruning.json` says and adapter-studio opens "
        "(`pipelines.language.loading.open_model`); transformers alone refuses it."
    )
    told = f"{base_name(config.base)} pruned to {share:.0%} of its parameters ({pruning.method})."
    if pruning.mask:
        told = f"{base_name(config.base)} with zeros in place of single weights ({pruning.method})."
    lines = [
        *front_matter(config.base, "transformers", ["pruned", "adapter-studio"], pipeline_tag="text-generation",
            base_model=base_name(config.base),
                      description=told),
        f"# {config.name}",
        "",
        f"{made} {opened}",
        "",
        f"- Parameters: {found.small:,} of {found.whole:,} ({share:.1%}), embeddings, norms and head included",
        f"- Key-value heads per layer: {_range(heads)} of {pruning.sizes.kv_heads} "
        f"({pruning.sizes.repeats} query heads each); channels: {_range(channels)} of {pruning.sizes.channels}",
        *([f"- Zeros in the linear layers of the pruned blocks: {pruning.zeros:.1%}, which save no memory"]
          if pruning.mask else []),
        f"- Fingerprint of the whole base: `{pruning.base}`; of what is kept: `{pruning.identity}`",
        "",
        *([] if pruning.mask else [f"![Kept heads and channels]({picture.FILE})", ""]),
    ]  # fmt: skip
    return "\n".join(lines)


def _range(counts: list[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def figures(pruning: Pruning, quantised: bool = False) -> dict[str, Any]:
    """Entries of a job's result: parameters, ratios (nominal and counted), bytes counted in 16 bits."""
    found = reduction(pruning, quantised)
    return {"uniform": pruning.uniform, "ratios": asdict(found), "bytes": found.small_bytes,
            "base_bytes": found.whole_bytes}  # fmt: skip
