"""The card of a trained language adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studio.training.cards import base_lines, base_name, front_matter
from studio.training.export import RECIPE_ENTRY
from studio.training.language.experts import frozen


def card(
    recipe: Mapping[str, Any],
    auto_class: str,
    pipeline_tag: str,
    asking: Sequence[str],
    reader: tuple[str, str] = ("tokenizer", "AutoTokenizer"),
    task: str = "",
) -> str:
    """The adapter's card: what it is, how it was made, how it is loaded.

    Args:
        auto_class: transformers' class for the base.
        pipeline_tag: what a hub calls the task.
        asking: lines of Python that use the loaded ``model`` and its reader once.
        reader: what turns inputs into tokens: its name in those lines, and transformers' class for it.
        task: what it does; empty = the configuration's task.
    """
    config, training, data, base = recipe["config"], recipe["training"], recipe["data"], recipe["base"]
    measured = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in training["validation"].items())
    labels = ", ".join(data.get("labels") or ())
    task = task or config.get("task") or "vision-language"
    method = config.get("method", "lora")
    mixture = method != "lora"
    what = f"mixture of LoRA experts ({method})" if mixture else "LoRA"
    said = f"A {task} adapter trained on {data['rows']} rows of {data['source']}."
    lines = [
        *front_matter(
            base["name"],
            "peft",
            ["mixture-of-experts" if mixture else "lora", "peft", "adapter-studio"],
            pipeline_tag=pipeline_tag,
            description=said,
        ),
        f"# {recipe['name']}",
        "",
        f"A {what} for **{base_name(base['name'])}** ({base['architecture']}), task {task}"
        + (f", labels: {labels}." if labels else "."),
        "",
        f"- {_adapter(config)}",
        f"- {training['steps']} steps of {training['batch']} samples on {data['rows']} rows, {config['optimizer']} at "
        f"{config['learning_rate']:g}, final loss {training['loss']:.4f}",
        *([f"- On {data['held_out']} held-out rows: {measured}"] if measured else []),
        f"- Digest of the base weights: `{base['digest']}`",
        f"- Data digest: `{data['digest']}`",
        "",
        "```python",
        f"from transformers import {reader[1]}, {auto_class}",
        *(["import adapters.layers.experts  # of adapter-studio: makes PEFT know this kind"] if mixture else []),
        "from peft import PeftModel",
        *base_lines(base["name"]),
        "",
        f"{reader[0]} = {reader[1]}.from_pretrained(base)",
        f"model = {auto_class}.from_pretrained(base" + (f", num_labels={len(data['labels'])})" if labels else ")"),
        'model = PeftModel.from_pretrained(model, ".")',
        *asking,
        "```",
        "",
        f"Made with adapter-studio; the whole recipe is in the weights' metadata (`{RECIPE_ENTRY}`).",
        "",
    ]
    return "\n".join(lines)


def _adapter(config: Mapping[str, Any]) -> str:
    """What was trained: rank and layers, or the adapters that are mixed."""
    if frozen(config.get("method", "lora")):
        return f"Mixes these adapters, which stay as they are: {config['experts']}"
    return f"Rank {config['rank']}, layers: {config['target_regex'] or config['targets']}, start: {config['init']}"
