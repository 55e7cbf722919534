"""The card of a trained RNA model or adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from studio.training.cards import base_name, front_matter
from studio.training.language.card import card as adapter_card

RECIPE_FILE = "adapter_studio_recipe.json"
_WORDS = 'words = " ".join(dna[i : i + {k}] for i in range(0, len(dna) - {last}, {stride}))'


def asking(k: int, stride: int, longest: int) -> tuple[str, ...]:
    """Lines of Python that use a loaded ``model`` and ``tokenizer`` once."""
    return (
        'dna = "ATGGCC" * 30',
        _WORDS.format(k=k, last=k - 1, stride=stride),
        f"tokens = tokenizer(words, return_tensors='pt', truncation=True, max_length={longest})",
        "print(model(**tokens).logits.softmax(-1))",
    )


def card(recipe: Mapping[str, Any], auto_class: str, pipeline_tag: str) -> str:
    """The card: of an adapter as of every language adapter, of a whole model what it is and how it is loaded."""
    config, data = recipe["config"], recipe["data"]
    lines = asking(data["k"], data["stride"], data["max_length"])
    if config["mode"] == "lora":
        longer = config["max_length"] if config["train_positions"] else None
        text = adapter_card(recipe, auto_class, pipeline_tag, lines)
        return _with_positions(text, longer) if longer else text
    training, base = recipe["training"], recipe["base"]
    measured = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in training["validation"].items())
    task = config["task"]
    return "\n".join([
        *front_matter(base["name"], "transformers", ["rna", "k-mer", "adapter-studio"], pipeline_tag=pipeline_tag,
                      description=f"A k-mer model of RNA ({task}) trained on {data['rows']} transcripts."),
        f"# {recipe['name']}",
        "",
        f"A BERT over {data['k']}-mers, stride {data['stride']}, every weight trained ({task}), from "
        f"{'random weights' if base['name'] == 'new' else base_name(base['name'])}"
        + (f"; labels: {', '.join(data['labels'])}." if data["labels"] else "."),
        "",
        f"- {training['steps']} steps of {training['batch']} rows on {data['rows']} transcripts of {data['source']}, "
        f"{config['optimizer']} at {config['learning_rate']:g}, final loss {training['loss']:.4f}",
        *([f"- On {data['held_out']} held-out transcripts: {measured or '—'}"] if data["held_out"] else []),
        f"- Data digest: `{data['digest']}`",
        "",
        "```python",
        f"from transformers import AutoTokenizer, {auto_class}",
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        f'model = {auto_class}.from_pretrained(".")',
        *lines,
        "```",
        "",
        f"Made with adapter-studio; the whole recipe is in `{RECIPE_FILE}`.",
        "",
    ])  # fmt: skip


def _with_positions(text: str, longest: int) -> str:
    """The adapter's card with the base opened at the adapter's length."""
    return text.replace(
        ".from_pretrained(base, num_labels=2)",
        f".from_pretrained(\n    base, num_labels=2, max_position_embeddings={longest}, "
        "ignore_mismatched_sizes=True\n)",
    )
