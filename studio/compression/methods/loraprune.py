"""``studio compress loraprune``: a smaller base, pruned while a LoRA learns (LoRAPrune, arXiv 2305.18403).

A language training with one more plugin; at its end the LoRA is merged into what is left of the base. The folder gets
``NAME/``, a transformers directory. If all layers are pruned alike (whole_first = whole_last = 0), any program opens
it; the paper keeps the first tenth of the layers and the last one whole, which only the studio opens.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapters import files
from adapters.compression.loraprune import LoraPrune, Settings
from adapters.compression.slicing import small_model
from adapters.formats import read
from adapters.formats.lora import MODEL
from adapters.progress import Monitor, Progress
from studio import library
from studio.compression import ready, small_bases
from studio.compression.pruning_schema import LoraPruneConfig
from studio.datasets.cache import fingerprint
from studio.jobs.kinds import Kind
from studio.library import adopt
from studio.training.session import SILENT
from studio.training.tasks import language

KIND = Kind(
    "compress-loraprune", "studio.compression.pruning_schema:LoraPruneConfig",
    "studio.compression.methods.loraprune:run", continues=True, ready="studio.compression.ready:pruning",
    afterwards="studio.compression.methods.loraprune:adopted", title="LoRAPrune", compress="loraprune",
    forecast="studio.compression.pruning_estimate:of_loraprune",
    help="Prune heads and channels of a base while it learns from rows of text: a smaller base.",
    example="studio compress loraprune smollm2 --data rows.jsonl --prune 0.3 --name small",
)  # fmt: skip


def run(
    config: LoraPruneConfig, folder: Path, monitor: Monitor = SILENT, resume: bool = False, keep: bool | int = False
) -> dict[str, Any]:
    """Prune the base while training, in ``folder``.

    Returns:
        As a language training's result, with ``base`` (folder of the smaller one) instead of ``adapter``,
        ``picture``, ``ratios``, ``uniform``, ``history`` ((step, share) of every pruning), ``bytes``, ``base_bytes``.

    Raises:
        InputError: what cannot be pruned or trained, in one sentence.
        Cancelled: stopped on request; a checkpoint to resume from was written.
    """
    ready.base_to_prune(config)
    plugin = LoraPrune(settings(config))
    result = language.run(config, folder, monitor, resume, [plugin], keep)
    adapter = Path(result.pop("adapter"))
    monitor.report(Progress("merging"))
    layers = read(adapter).parts[MODEL]  # cut to what is left already
    whole = small_bases.open_whole(config)
    pruning = replace(plugin.pruning(), base=fingerprint(whole.model), base_name=config.base)
    small = small_model(whole.model, pruning)
    with torch.no_grad():
        for name, layer in layers.items():
            weight = small.get_parameter(f"{name}.weight")
            weight.add_(layer.delta().to(weight))
    shutil.rmtree(adapter)  # it belongs to the small base without it
    held = result["validation"][-1] if result["validation"] else {}
    told = (
        f"{config.base}, pruned while it learnt from {Path(config.data).name} ({result['steps']} steps, LoRAPrune)"
        + (f"; loss {held['validation_loss']:.4f} on held-out rows." if "validation_loss" in held else ".")
    )
    place = small_bases.write(small, whole.tokenizer, pruning, folder / config.name, config, told)
    files.write_text(Path(result["card"]), (place / "README.md").read_text(encoding="utf-8"))
    return {
        **result, "base": str(place), "picture": str(small_bases.draw(pruning, folder)), "history": plugin.history,
        **small_bases.figures(pruning),
    }  # fmt: skip


def settings(config: LoraPruneConfig) -> Settings:
    """The plugin's settings."""
    return Settings(
        config.prune, config.prune_every, config.prune_warmup, config.prune_cooldown, config.whole_first,
        config.whole_last, config.criterion, config.prune_form, config.prune_decay,
    )  # fmt: skip


def adopted(config: LoraPruneConfig, result: dict[str, Any]) -> dict[str, Any]:
    """Put the small base into the library."""
    return {**result, "library": library.import_base(result["base"], adopt.free_name(config.name, "base")).name}
