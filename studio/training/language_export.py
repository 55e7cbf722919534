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
from studio.training.cards import base_lines, base_name, front_matter
from studio.training.export import RECIPE_ENTRY
from studio.training.schemas.language import TrainLanguageConfig


def write_adapter(
    layers: Mapping[str, LoraLayer],
    heads: Mapping[str, torch.Tensor],
    target: Path,
    config: TrainLanguageConfig,
    recipe: Mapping[str, Any],
    options: Mapping[str, Any],
    text: str,
) -> Path:
    """Write the PEFT directory ``target`` and return it.

    Args:
        layers: module path -> layer.
        heads: whole trained modules (a classification head), tensors by PEFT's keys.
        options: entries of ``adapter_config.json`` that only the task knows.
        text: the card.

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
    entries = {
        **options,
        "base_model_name_or_path": base_name(config.base),
        "modules_to_save": sorted({name.removeprefix(PREFIX).rsplit(".", 1)[0] for name in heads}) or None,
    }
    with files.whole(target) as part:
        part.mkdir()
        write_directory(part, kept, {RECIPE_ENTRY: json.dumps(recipe, ensure_ascii=False)}, entries, more)
        files.write_text(part / "README.md", text)
    return target


def _of(layer: LoraLayer) -> list[torch.Tensor]:
    return [layer.A, layer.B, *([] if layer.magnitude is None else [layer.magnitude])]


def card(recipe: Mapping[str, Any], auto_class: str) -> str:
    """The adapter's card: what it is, how it was made, how it is loaded (the base by ``auto_class``)."""
    config, training, data, base = recipe["config"], recipe["training"], recipe["data"], recipe["base"]
    measured = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in training["validation"].items())
    labels = ", ".join(data.get("labels") or ())
    said = f"A {config['task']} adapter trained on {data['rows']} rows of {data['source']}."
    lines = [
        *front_matter(
            base["name"], "peft", ["lora", "peft", "adapter-studio"], pipeline_tag=_PIPELINES[config["task"]],
            description=said,
        ),
        f"# {recipe['name']}",
        "",
        f"A LoRA for **{base_name(base['name'])}** ({base['architecture']}), task {config['task']}"
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
        f"from transformers import AutoTokenizer, {auto_class}",
        "from peft import PeftModel",
        *base_lines(base["name"]),
        "",
        "tokenizer = AutoTokenizer.from_pretrained(base)",
        f"model = {auto_class}.from_pretrained(base"
        + (f", num_labels={len(data['labels'])})" if labels else ")"),
        'model = PeftModel.from_pretrained(model, ".")',
        *_asking(config["task"]),
        "```",
        "",
        f"Made with adapter-studio; the whole recipe is in the weights' metadata (`{RECIPE_ENTRY}`).",
        "",
    ]
    return "\n".join(lines)


def _asking(task: str) -> list[str]:
    """Lines that use the loaded model once."""
    if task == "causal":
        return [
            'inputs = tokenizer("Hello", return_tensors="pt")',
            "made = model.generate(**inputs, max_new_tokens=20)",
            "print(tokenizer.decode(made[0], skip_special_tokens=True))",
        ]
    return ['print(model(**tokenizer("Hello", return_tensors="pt")).logits)']


_PIPELINES = {"causal": "text-generation", "classification": "text-classification", "masked": "fill-mask"}
