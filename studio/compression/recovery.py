"""An adapter of a pruned base becomes an ordinary LoRA of the whole base (LoRAM's recovery)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapters.compression.loram import recovered
from adapters.compression.structure import Pruning, reduction
from adapters.errors import InputError
from adapters.formats import read
from adapters.formats.lora import MODEL
from studio.training.export import write_model_adapter
from studio.training.language.card import card
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.tasks.causal import CausalTask


def recover(
    adapter: Path, pruning: Pruning, target: Path, base: str, config: TrainLanguageConfig | None = None
) -> Path:
    """Write the adapter of a pruned base as the PEFT directory ``target`` for the whole base; returns it.

    Args:
        adapter: trained on the pruned base.
        base: what the whole base is called.
        config: of the training; None = as its recipe says, or plain defaults.

    Raises:
        InputError: an adapter of another pruning or of a whole base, a mixture, a new head, or DoRA.
    """
    file = read(adapter)
    recipe = file.recipe()
    made_for = recipe.get("base", {}).get("pruning", "")
    if made_for and made_for != pruning.identity:
        raise InputError(f"The adapter '{adapter.name}' was trained on another pruned base: choose that one.")
    if set(file.parts) != {MODEL} or file.config.get("modules_to_save"):
        raise InputError(f"The adapter '{adapter.name}' is not a plain LoRA of one language model.")
    layers = recovered(file.parts[MODEL], pruning)
    used = config or TrainLanguageConfig.parse({"data": "unknown", "base": base, "name": target.name})
    told = _told(recipe, pruning, used)
    beside = {"README.md": card(told, CausalTask.auto_class, CausalTask.pipeline_tag, CausalTask.asking)}
    options = {"task_type": file.config.get("task_type") or CausalTask.peft_type}
    return write_model_adapter(layers, target, used, told if recipe else {}, beside if recipe else {}, options)


def _told(recipe: dict[str, Any], pruning: Pruning, config: TrainLanguageConfig) -> dict[str, Any]:
    """The recipe of the recovered adapter: the whole base, and how much smaller the one it learnt on was."""
    if not recipe:
        return {}
    found = reduction(pruning, config.quantization == "4bit")
    small = {"method": pruning.method, "aligned": pruning.aligned, "identity": pruning.identity,
             "parameters": found.small, "of": found.whole, "reduction": round(found.nominal, 2),
             **({"zeros": pruning.zeros} if pruning.mask else {})}  # fmt: skip
    base = {**recipe["base"], "name": config.base, "digest": pruning.base}
    base.pop("pruning", None)
    return {**recipe, "job": config.kind, "name": config.name, "base": base,
            "config": config.model_dump(mode="json"), "training": {**recipe["training"], "on": small}}  # fmt: skip
