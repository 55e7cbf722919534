"""Saves what the method "merge" shows as one LoRA that draws the same at weight 1.

The sum of the adapters at their weights (also those in the text encoders and the factors per block) is exact:
:mod:`adapters.merging.concatenate`. What is not a sum of weights is refused with the reason.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from adapters.errors import InputError
from studio.composition.schema import AdapterUse, ComposeConfig

if TYPE_CHECKING:
    from adapters.formats import LoraFile

METHOD = "merge"


class Saved(NamedTuple):
    """A saved mix: its name in the library, and a sentence on how exactly it holds the sum."""

    name: str
    accuracy: str


def check(config: ComposeConfig) -> None:
    """Raise :class:`InputError` unless the composition is the same sum of its adapters at every step."""
    if not config.adapters:
        raise InputError("There is no adapter to save: choose some and make a picture first.")
    if config.method != METHOD:
        raise InputError("Only what Merge shows is one LoRA: make the picture with the method Merge, then save it.")
    for use in config.adapters:
        if any(strength != 1 for _, strength in use.schedule):
            raise InputError(
                f"'{use.name or use.path}' acts in only a part of the steps, a LoRA in all: remove its schedule."
            )


def save(config: ComposeConfig, name: str, rank: int | None = None, preview: Path | None = None) -> Saved:
    """Write the mix into the library, and compare the file with the exact sum.

    Args:
        config: a composition by ``merge``, with this machine's paths.
        name: its name; a number is added if it is taken.
        rank: cut the result to this rank; None = exact (the ranks add up).
        preview: its preview picture.

    Raises:
        InputError: it is not a sum (see :func:`check`; DoRA adapters are not either), an adapter is missing, or the
            written file does not contain them.
    """
    from adapters import formats
    from adapters.merging.accuracy import write_checked
    from adapters.merging.concatenate import summands
    from studio import library
    from studio.adapter_files import merging
    from studio.adapter_files.fit_to_base import fitted
    from studio.library import adopt, edit

    check(config)
    read = [formats.read(library.resolve_adapter(use.path)) for use in config.adapters]
    files = fitted(read, config.base)
    weights = [_weights(use, file) for use, file in zip(config.adapters, files, strict=True)]
    factors = [_factors(use, file) for use, file in zip(config.adapters, files, strict=True)]
    merged = merging.merge(merging.DEFAULT, files, weights, rank, factors=factors)
    triggers = list(dict.fromkeys(word for use in config.adapters if use.weight for word in use.triggers))
    record = {"job": "mix", "triggers": triggers, "config": {"base": config.base}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mix.safetensors"
        entries = {"adapter-studio": json.dumps(record)}
        sums = summands(files, weights, factors)
        _, accuracy = write_checked(merged.file, file, "diffusers", sums, not merged.errors, entries)
        made = edit.import_adapter(file, adopt.free_name(name.strip() or "mix"))
    if preview is not None:
        edit.set_preview(made, preview)
    return Saved(made.name, str(accuracy))


def save_apart(config: ComposeConfig, name: str, rank: int | None = None, preview: Path | None = None) -> Saved:
    """:func:`save` in a separate process, so that the web app never loads torch."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    check(config)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(save, config, name, rank, preview).result()


def _weights(use: AdapterUse, file: LoraFile) -> dict[str, float]:
    """Strength per component: the text encoders may have their own."""
    text = use.weight if use.te_weight is None else use.te_weight
    return {part: text if part.startswith("text_encoder") else use.weight for part in file.parts}


def _factors(use: AdapterUse, file: LoraFile) -> dict[str, float]:
    """Factor per layer, for blocks that have one."""
    from pipelines.diffusion import checks

    if not use.blocks:
        return {}
    denoiser = next((part for part in file.parts if not part.startswith("text_encoder")), "unet")
    blocks = checks.check_blocks(use.blocks, file.parts, denoiser)
    full = [f"{component}.{module}" for component, module, _ in file.layers()]
    return {name: checks.block_factor(name, blocks) for name in full}
