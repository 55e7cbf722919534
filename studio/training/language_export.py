"""From a trained language adapter to a PEFT directory that any program loads, with its recipe, and a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapters import files
from adapters.errors import InputError
from adapters.formats import LoraLayer
from adapters.formats.peft_directory import PREFIX, write_directory
from pipelines.precision import DTYPES
from studio import privacy
from studio.training.export import RECIPE_ENTRY
from studio.training.language_layers import TASK_TYPES
from studio.training.schemas.language import TrainLanguageConfig

HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""What other programs call the bases that we have under a name of our own."""


def write_adapter(
    layers: Mapping[str, LoraLayer],
    heads: Mapping[str, torch.Tensor],
    folder: Path,
    config: TrainLanguageConfig,
    recipe: Mapping[str, Any],
    transposed: bool = False,
) -> Path:
    """Write the PEFT directory ``folder / NAME`` and return it.

    Args:
        layers: module path -> layer.
        heads: whole trained modules (a classification head), tensors by PEFT's keys.
        transposed: the base's layers keep their weights transposed (GPT-2).

    Raises:
        InputError: numbers that are not finite, or a disk that is full.
    """
    dtype = DTYPES[config.save_dtype]
    kept = {
        name: replace(
            layer, A=layer.A.to(dtype), B=layer.B.to(dtype),
            magnitude=None if layer.magnitude is None else layer.magnitude.to(dtype),
        )
        for name, layer in layers.items()
    }  # fmt: skip
    more = {name: tensor.detach().cpu().to(dtype) for name, tensor in heads.items()}
    for name, numbers in [*more.items(), *((name, tensor) for name, layer in kept.items() for tensor in _of(layer))]:
        if not numbers.isfinite().all():
            raise InputError(f"The adapter holds numbers that are not finite in '{name}': not saved.")
    options = {
        "task_type": TASK_TYPES[config.task],
        "base_model_name_or_path": HUB_NAMES.get(config.base, privacy.names_only(config.base)),
        "modules_to_save": sorted({name.removeprefix(PREFIX).rsplit(".", 1)[0] for name in heads}) or None,
        "fan_in_fan_out": transposed,
    }
    target = folder / config.name
    with files.whole(target) as part:
        part.mkdir()
        write_directory(part, kept, {RECIPE_ENTRY: json.dumps(recipe, ensure_ascii=False)}, options, more)
        files.write_text(part / "README.md", card(recipe))
    return target


def _of(layer: LoraLayer) -> list[torch.Tensor]:
    return [layer.A, layer.B, *([] if layer.magnitude is None else [layer.magnitude])]


def card(recipe: Mapping[str, Any]) -> str:
    """The adapter's card: what it is, how it was made, how it is loaded."""
    config, training, data, base = recipe["config"], recipe["training"], recipe["data"], recipe["base"]
    measured = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in training["validation"].items())
    labels = ", ".join(data.get("labels") or ())
    said = f"A {config['task']} adapter trained on {data['rows']} rows of {data['source']}."
    lines = [
        "---",
        f"base_model: {json.dumps(HUB_NAMES.get(base['name'], base['name']))}",
        "library_name: peft",
        f"description: {json.dumps(said)}",
        "---",
        f"# {recipe['name']}",
        "",
        f"A LoRA for **{base['name']}** ({base['architecture']}), task {config['task']}"
        + (f", labels: {labels}." if labels else "."),
        "",
        f"- Rank {config['rank']}, layers: {config['target_regex'] or config['targets']}, start: {config['init']}",
        f"- {training['steps']} steps of {training['batch']} samples on {data['rows']} rows, {config['optimizer']} at "
        f"{config['learning_rate']:g}, final loss {training['loss']:.4f}",
        *([f"- On {data['held_out']} rows kept out: {measured}"] if measured else []),
        f"- Digest of the base weights: `{base['digest']}`",
        f"- Data digest: `{data['digest']}`",
        "",
        "```python",
        f"from transformers import {_AUTO[config['task']]}",
        "from peft import PeftModel",
        "",
        f"model = {_AUTO[config['task']]}.from_pretrained({base['name']!r}"
        + (f", num_labels={len(data['labels'])})" if labels else ")"),
        f"model = PeftModel.from_pretrained(model, {recipe['name']!r})",
        "```",
        "",
        f"Made with adapter-studio; the whole recipe is in the weights' metadata (`{RECIPE_ENTRY}`).",
        "",
    ]
    return "\n".join(lines)


_AUTO = {
    "causal": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "masked": "AutoModelForMaskedLM",
}
