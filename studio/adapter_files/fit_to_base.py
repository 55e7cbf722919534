"""Fits adapter files to a base model, for converting, merging and comparing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters.formats import LoraFile


def fitted(files: Sequence[LoraFile], base: str) -> list[LoraFile]:
    """``files`` with the module names and shapes of ``base`` (name in the library, path or hub id).

    Raises:
        adapters.errors.FamilyError: a file was made for another model.
    """
    from adapters.formats.fit import fit
    from pipelines.diffusion.loading import modern_blocks

    parts, unet_config = models(base)
    return [fit(modern_blocks(file, unet_config), parts, f"'{base}'") for file in files]


def changes(file: LoraFile, base: str) -> dict[str, str]:
    """Component of ``base`` -> which share of its layers the adapter changes, as text.

    Raises:
        adapters.errors.FamilyError: the file was made for another model.
    """
    from adapters.formats.coverage import coverage
    from adapters.formats.fit import fit
    from pipelines.diffusion.loading import modern_blocks

    parts, unet_config = models(base)
    made = fit(modern_blocks(file, unet_config), parts, f"'{base}'")
    return {name: str(coverage(parts[name], layers)) for name, layers in made.parts.items()}


def models(base: str) -> tuple[dict[str, Any], Any]:
    """The parts of a base model that adapters change, by component, and its UNet's configuration."""
    from adapters.formats.lora import COMPONENTS
    from pipelines.diffusion.loading import open_pipeline
    from studio import library

    pipe = open_pipeline(library.resolve_pipeline(base), device="cpu")[0]
    parts = {name: getattr(pipe, name) for name in COMPONENTS if getattr(pipe, name, None) is not None}
    return parts, parts["unet"].config if "unet" in parts else None
