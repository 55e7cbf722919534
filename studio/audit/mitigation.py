"""The one place of the audit that writes weights: a copy of an adapter, pulled towards the aligned model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError

if TYPE_CHECKING:
    from adapters.formats import LoraFile
    from adapters.inspection.intruders import Weights
    from adapters.inspection.safe_lora import Mode

PROVENANCE = "provenance.json"
HALVINGS = 5


def project(
    file: LoraFile, base: Weights, twin: Weights, mode: Mode, tau: float, undo_limit: float
) -> tuple[LoraFile, dict[str, Any]]:
    """The adapter with its modules projected (:mod:`adapters.inspection.safe_lora`), and what was done.

    Raises:
        InputError: a DoRA adapter, whose normalisation a projection of B does not reach.
    """
    from adapters.formats.lora import group_dict
    from adapters.inspection.safe_lora import mitigated

    if file.is_dora():
        raise InputError("A DoRA adapter cannot be projected: extract it as a LoRA first (studio lora extract).")
    layers, touched = {}, []
    for component, module, layer in file.layers():
        if layer.embedding or layer.A.ndim != 2:
            layers[component, module] = layer
            continue
        V = base(component, module).double() - twin(component, module).double()
        made = mitigated(layer, V, mode, tau, undo_limit)
        layers[component, module] = made.layer
        if made.projected or made.undone:
            touched.append({
                "module": module, "score": made.score, "undo": made.undo, "projected": made.projected,
                "undo_taken_out": made.undone, "rank_error": made.error,
            })  # fmt: skip
    return file.with_parts(group_dict(layers)), {"mode": mode, "tau": tau, "undo_limit": undo_limit, "modules": touched}


def scaled(file: LoraFile, factor: float) -> LoraFile:
    """The adapter with every update times ``factor``."""
    from adapters.formats.lora import group_dict

    if file.is_dora():
        raise InputError("A DoRA adapter has no strength of its own to scale: extract it as a LoRA first.")
    return file.with_parts(group_dict({(c, m): replace(layer, B=layer.B * factor) for c, m, layer in file.layers()}))


def largest_passing(passes: Callable[[float], bool]) -> float:
    """The largest factor in [0, 1] found by bisection at which the refusals stay within their limit; 0 if none does."""
    if passes(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def write(file: LoraFile, source: Path, place: Path, provenance: dict[str, Any]) -> Path:
    """Write a PEFT folder, with the source's ``adapter_config.json`` where it has one, and ``provenance.json``."""
    from safetensors.torch import load_file, save_file

    from adapters import files
    from adapters.formats import write_peft
    from adapters.formats.lora import MODEL

    config, kept = source / "adapter_config.json", source / "adapter_model.safetensors"
    tensors = load_file(kept) if kept.is_file() and config.is_file() else {}
    changed = {
        f"base_model.model.{module}.lora_{letter}.weight": getattr(layer, letter)
        for module, layer in file.parts[MODEL].items() for letter in "AB" if not layer.embedding
    }  # fmt: skip
    if tensors and set(changed) <= set(tensors):
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(config, place / config.name)
        made = {name: changed.get(name, old).to(old.dtype).contiguous() for name, old in tensors.items()}
        files.write(place / kept.name, lambda part: save_file(made, part, metadata={"format": "pt"}))
    else:
        write_peft(file, place)
    files.write_text(place / PROVENANCE, json.dumps(provenance, indent=1))
    return place
