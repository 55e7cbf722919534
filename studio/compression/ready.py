"""Refuses compressions that are known to fail, before a job is made."""

from __future__ import annotations

import json
from pathlib import Path

from adapters.compression import L4Q_FILE
from adapters.compression.structure import prunable, read_pruning, sizes_of
from adapters.errors import InputError
from pipelines.language.compressed import read_manifest
from studio import library
from studio.compression.pruning_schema import PruningConfig
from studio.compression.schema import CompressConfig, CompressL4qConfig, RowsFields
from studio.library import packaged
from studio.training.ready import language


def _packaged(base: str) -> bool:
    """Whether it is a packaged language model: whole, and unpacked only when it is used."""
    known = packaged.known().get(base)
    return known is not None and known.kind == "language model"


def base_and_rows(config: CompressConfig) -> None:
    """Check the base, and the file of rows if there is one.

    Raises:
        InputError: there is no such base or file, or the base is compressed already.
    """
    if not _packaged(config.base):
        place = Path(library.resolve_language(config.base))
        if read_manifest(place) is not None:
            raise InputError(f"'{config.base}' is compressed already: start from the model it was made from.")
    if isinstance(config, RowsFields) and config.data:
        from studio.training.language import rows
        from studio.training.schemas.language import TrainLanguageConfig

        rows.read(TrainLanguageConfig.parse({"data": config.data, "base": config.base}))


def pruning(config: PruningConfig) -> None:
    """Check what a language training checks, and that the base can be pruned.

    Raises:
        InputError: the first thing that would make the pruning fail.
    """
    language(config)
    base_to_prune(config)


def base_to_prune(config: PruningConfig) -> None:
    """Check that the base is like Llama, whole, not in few bits, and has layers to prune; reads no weights.

    Raises:
        InputError: it is not.
    """
    if _packaged(config.base):
        return
    place = Path(library.resolve_language(config.base))
    if read_pruning(place) is not None:
        raise InputError(f"'{config.base}' is pruned already: prune the model it was made from, with a larger share.")
    if read_manifest(place) is not None:
        raise InputError(f"'{config.base}' is compressed already: prune the model it was made from.")
    file = place / "config.json"
    if file.is_file():
        sizes = sizes_of(json.loads(file.read_text(encoding="utf-8")))
        if config.prune:
            prunable(sizes, config.whole_first, config.whole_last)


def l4q(config: CompressL4qConfig) -> None:
    """Check the base, and that the adapter was trained through a rounding.

    Raises:
        InputError: there is no such base or adapter, or it was not.
    """
    base_and_rows(config)
    rounded(config.adapter)


def rounded(adapter: str) -> Path:
    """Folder of an adapter that was trained with l4q_bits; raises :class:`InputError` for another one."""
    place = library.resolve_adapter(adapter)
    if not (place / L4Q_FILE).is_file():
        raise InputError(f"'{adapter}' was not trained through a rounding: train it with l4q_bits, or use compress lq.")
    return place
