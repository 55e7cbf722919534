"""Refuses compressions that are known to fail, before a job is made."""

from __future__ import annotations

from pathlib import Path

from adapters.compression import L4Q_FILE
from adapters.errors import InputError
from pipelines.language.compressed import read_manifest
from studio import library
from studio.compression.schema import CompressConfig, CompressL4qConfig, RowsFields
from studio.library import smollm2


def base_and_rows(config: CompressConfig) -> None:
    """Check the base, and the file of rows if there is one.

    Raises:
        InputError: there is no such base or file, or the base is compressed already.
    """
    if config.base != smollm2.NAME:  # which is unpacked when it is used
        place = Path(library.resolve_language(config.base))
        if read_manifest(place) is not None:
            raise InputError(f"'{config.base}' is compressed already: start from the model it was made from.")
    if isinstance(config, RowsFields) and config.data:
        from studio.training.language import rows
        from studio.training.schemas.language import TrainLanguageConfig

        rows.read(TrainLanguageConfig.parse({"data": config.data, "base": config.base}))


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
