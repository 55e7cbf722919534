"""A denoiser from a file of its own: GGUF, whose weights are in few bits, or safetensors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError, MissingDependencyError
from pipelines.diffusion import halves
from pipelines.diffusion.families import Family

if TYPE_CHECKING:
    import torch
    from torch import nn


def open_denoisers(
    place: str | Path, source: str, kind: Any, family: Family, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Attribute -> denoiser from a file of its own, for every denoiser of the base.

    Of a base with two, ``place`` is one of two files whose names differ in the denoiser's word (x_high_noise.gguf), as
    for adapters (:mod:`pipelines.diffusion.halves`).

    Args:
        place, source, kind, dtype: as for :func:`open_denoiser`.

    Raises:
        InputError: as :func:`open_denoiser`, or the other file is missing.
        MissingDependencyError: as :func:`open_denoiser`.
    """
    entries = kind.load_config(source)
    present = [one for one in family.denoisers if (entries.get(one.name) or [None])[0]]
    path = Path(place).expanduser()
    files = dict.fromkeys((one.word for one in present), path)
    if len(present) > 1 and path.is_file():
        files = halves.together(path, present)
        if not files:
            words = " and ".join(f"x_{one.word}_noise{path.suffix}" for one in present)
            raise InputError(
                f"The base '{source}' has {len(present)} denoisers, and '{path.name}' is one: its name must say which, "
                f"and the other file must lie beside it, as in {words}."
            )
    return {one.name: open_denoiser(files[one.word], source, kind, one.name, dtype) for one in present}


def files_of(place: str | Path, family: Family) -> list[Path]:
    """The files that :func:`open_denoisers` reads, ``place`` first."""
    path = Path(place).expanduser()
    pair = halves.together(path, family.denoisers).values()
    return [path, *(file for file in pair if file != path)]


def open_denoiser(place: str | Path, source: str, kind: Any, component: str, dtype: torch.dtype) -> nn.Module:
    """A denoiser from a file of its own, GGUF or safetensors; the rest of the base stays in ``source``.

    Args:
        place: the file.
        source: hub id or directory of the base, which has the denoiser's class and configuration.
        kind: diffusers' class of the pipeline.
        component: the denoiser's attribute in it.
        dtype: in which it computes.

    Raises:
        InputError: no such file, or one that is not for this denoiser.
        MissingDependencyError: a GGUF file without the package ``gguf``.
    """
    import diffusers

    path = Path(place).expanduser()
    if not path.is_file():
        raise InputError(f"There is no denoiser '{place}': give a .gguf or .safetensors file.")
    options: dict[str, Any] = {}
    if path.suffix.lower() == ".gguf":
        if importlib.util.find_spec("gguf") is None:
            raise MissingDependencyError("gguf", "quantized", "A denoiser in a GGUF file")
        chosen: Any = diffusers.GGUFQuantizationConfig
        options["quantization_config"] = chosen(compute_dtype=dtype)
    name = kind.load_config(source)[component][1]
    try:
        model: nn.Module = getattr(diffusers, name).from_single_file(
            str(path), config=source, subfolder=component, dtype=dtype, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"The denoiser '{path.name}' could not be opened as the {name} of '{source}': {reason}") from (
            error
        )
    missing = [path for path, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise InputError(
            f"The denoiser '{path.name}' lacks {len(missing)} weights of the {name} of '{source}', such as "
            f"'{missing[0]}': it is for another model."
        )
    return model
