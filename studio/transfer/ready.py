"""Checks before a job is made, without models."""

from __future__ import annotations

from pathlib import Path

from adapters.errors import InputError
from studio import library
from studio.library import packaged
from studio.training.language.rows import template_of
from studio.transfer import bundle, rows
from studio.transfer.schema import PrepareTransferConfig, TransferConfig


def prepare(config: PrepareTransferConfig) -> None:
    """Check adapter, base, rows and the place of the bundle.

    Raises:
        InputError: the first thing that would make the job fail.
    """
    library.resolve_adapter(config.adapter)
    _base(config.base)
    template_of(config.trained(config.base, config.data, "data", chat_template=config.chat_template))
    rows.read(config.trained(config.base, config.data, "data"))
    place = Path(config.out).expanduser()
    if config.out and place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError(f"'{config.out}' exists already: name a new folder for the bundle.")


def transfer(config: TransferConfig) -> None:
    """Check the bundle, both bases and the test rows.

    Raises:
        InputError: the first thing that would make the job fail.
    """
    found = bundle.read(config.bundle)
    if config.filter:
        bundle.check_discriminator(found)
    _base(config.base or found.base, "" if config.base else f" Say where the base '{found.base}' is now with --base.")
    _base(config.to)
    template_of(config.trained(config.to, "data.jsonl", "data", chat_template=config.chat_template))
    if config.test_data:
        rows.read(config.trained(config.to, config.test_data, "data"))


def _base(name: str, advice: str = "") -> None:
    known = packaged.known().get(name)
    if known is not None and known.kind == "language model":  # it is unpacked when it is needed
        return
    try:
        library.resolve_language(name)
    except InputError as error:
        raise InputError(f"{error}{advice}") from None
