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

    pipe, family = _opened(base)
    return [fit(_named(file, pipe, family), _parts(pipe), f"'{base}'") for file in files]


def changes(file: LoraFile, base: str) -> dict[str, str]:
    """Component of ``base`` -> which share of its layers the adapter changes, as text.

    Raises:
        adapters.errors.FamilyError: the file was made for another model.
    """
    from adapters.formats.coverage import coverage
    from adapters.formats.fit import fit

    pipe, family = _opened(base)
    parts = _parts(pipe)
    made = fit(_named(file, pipe, family), parts, f"'{base}'")
    return {name: str(coverage(parts[name], layers)) for name, layers in made.parts.items()}


def models(base: str) -> tuple[dict[str, Any], Any]:
    """The parts of a base model that adapters change, by component, and its UNet's configuration."""
    parts = _parts(_opened(base)[0])
    return parts, parts["unet"].config if "unet" in parts else None


def _opened(base: str) -> tuple[Any, Any]:
    """The diffusers pipeline of a base, and its family."""
    from pipelines.diffusion.loading import open_pipeline
    from studio import library

    return open_pipeline(library.resolve_pipeline(base), device="cpu")[:2]


def _parts(pipe: Any) -> dict[str, Any]:
    from adapters.formats.lora import COMPONENTS

    return {name: getattr(pipe, name) for name in COMPONENTS if getattr(pipe, name, None) is not None}


def _named(file: LoraFile, pipe: Any, family: Any) -> LoraFile:
    """``file`` with diffusers' names instead of those that other programs have for the family's modules."""
    from pipelines.diffusion.loading import modern_blocks

    named: LoraFile = family.named(modern_blocks(file, getattr(getattr(pipe, "unet", None), "config", None)), pipe)
    return named
