"""Adapters for bases with several denoisers: which denoiser each of their layers is for.

Such a base has one denoiser for high noise and one for low noise (:class:`pipelines.diffusion.families.base.Denoiser`).
Its adapters come

    in one file    ``transformer.`` and ``transformer_2.`` before the module names
    in two files   whose names differ in one word: ``x_high_noise.safetensors``, ``x_low_noise.safetensors``; they are
                   one adapter, and its other half is looked for beside the file that is named
    unmarked       made for a base with one denoiser (Wan 2.1): it acts in all of them
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from adapters.errors import InputError, nearest
from adapters.formats import LoraFile, read
from pipelines.diffusion.families.base import Denoiser

NAMES = ("ss_output_name", "modelspec.title", "name", "ss_sd_model_name")
"""Metadata entries in which trainers write the name of the adapter or of the model it was trained on."""

Named = Callable[[LoraFile], LoraFile]


def whole(file: LoraFile, denoisers: Sequence[Denoiser], only: str = "", named: Named = lambda file: file) -> LoraFile:
    """``file`` with its layers bound to the denoisers, together with its other half if it is one of two.

    Args:
        file: an adapter with diffusers' module names.
        denoisers: those of the base.
        only: attribute of the denoiser to bind to, instead of what file and name say.
        named: gives the other half diffusers' module names.

    Raises:
        InputError: the other half is missing or does not fit, or there is no such denoiser.
    """
    names = [one.name for one in denoisers]
    if only and only not in names:
        raise InputError(f"This base has no denoiser '{only}'{nearest(only, names)}: it has {', '.join(names)}.")
    found = [name for name in file.parts if name in names]
    if len(names) < 2 or not found:
        return file
    if len(found) > 1 or found[0] != names[0]:  # bound by the file itself
        return _only(file, names, only) if only else file
    if only:
        return _bound(file, names[0], [only])
    half = half_of(file, denoisers)
    if half is None:
        return _bound(file, names[0], names)
    made = _bound(file, names[0], [half.name])
    paths = [file.path] if file.path else []
    for other in denoisers:
        if other is half:
            continue
        place = partner(file.path, half, other) if file.path else None
        if place is None or not place.exists():
            raise InputError(_missing(file, half, other, place))
        read_half = named(read(place))
        if set(read_half.parts) & set(names) != {names[0]}:
            raise InputError(f"'{place.name}' is not the other half of '{_name(file)}': it has other parts.")
        made = _joined(made, _bound(read_half, names[0], [other.name]))
        paths.append(place)
    return replace(made, path=file.path)


def half_of(file: LoraFile, denoisers: Sequence[Denoiser]) -> Denoiser | None:
    """The denoiser that the file's name or metadata says it is for; None if they do not say.

    A word alone ("high") counts only where a file with the other's word is beside it; "high_noise" always counts.
    """
    name = _name(file)
    told = [one for one in denoisers if re.search(_noise(one), name)]
    if len(told) == 1:
        return told[0]
    for one in denoisers:
        others = [partner(file.path, one, other) for other in denoisers if other is not one] if file.path else []
        if others and all(place is not None and place.exists() for place in others):
            return one
    texts = " ".join(file.metadata.get(entry, "") for entry in NAMES)
    told = [one for one in denoisers if re.search(_noise(one), texts)]
    return told[0] if len(told) == 1 else None


def partner(path: Path | None, half: Denoiser, other: Denoiser) -> Path | None:
    """Where the half for ``other`` would be, beside the file ``path`` for ``half``; None if its name has no mark."""
    if path is None:
        return None
    marks = list(re.finditer(_noise(half), path.name)) or list(re.finditer(_word(half), path.name))
    if not marks:
        return None
    mark = marks[-1]
    word = mark.group(1)
    written = other.word.upper() if word.isupper() else other.word.title() if word.istitle() else other.word
    return path.with_name(path.name[: mark.start(1)] + written + path.name[mark.end(1) :])


def together(path: Path, denoisers: Sequence[Denoiser]) -> dict[str, Path]:
    """Word of each denoiser -> the file for it, if ``path`` is one of a whole pair; else empty."""
    for one in denoisers:
        found = {other.word: path if other is one else partner(path, one, other) for other in denoisers}
        files = {word: place for word, place in found.items() if place is not None and place.is_file()}
        if len(files) == len(denoisers) > 1:
            return files
    return {}


def pair_in(folder: Path, denoisers: Sequence[Denoiser]) -> Path | None:
    """The first half of the one pair that a folder holds; None if it holds anything else."""
    if len(denoisers) < 2 or not folder.is_dir():
        return None
    files = sorted(folder.glob("*.safetensors"))
    firsts = [file for file in files if partner(file, denoisers[0], denoisers[1]) in files]
    return firsts[0] if len(firsts) == 1 and len(files) == len(denoisers) else None


def _missing(file: LoraFile, half: Denoiser, other: Denoiser, place: Path | None) -> str:
    where = f"'{place.name}' is not beside it" if place else "it is not known where that is"
    return (
        f"'{_name(file)}' is the half for {half.title} of an adapter of two files, and the half for {other.title} is "
        f"missing: {where}. Put it there, or use this half alone (denoiser '{half.name}')."
    )


def _name(file: LoraFile) -> str:
    return file.path.name if file.path else "The adapter"


def _word(one: Denoiser) -> str:
    """The denoiser's word on its own, as group 1: "-HIGH-", "_high.", but not "highlight"."""
    return rf"(?i:(?<![a-z])({one.word})(?![a-z]))"


def _noise(one: Denoiser) -> str:
    """The word before "noise", as group 1: "high_noise", "HighNoise"."""
    return rf"(?i:(?<![a-z])({one.word})(?=[-_. ]?noise))"


def _bound(file: LoraFile, part: str, names: Sequence[str]) -> LoraFile:
    """``file`` with the layers of ``part`` in the denoisers ``names`` instead."""
    rest = {component: layers for component, layers in file.parts.items() if component != part}
    return file.with_parts({**dict.fromkeys(names, file.parts[part]), **rest}, file.flat)


def _only(file: LoraFile, names: Sequence[str], only: str) -> LoraFile:
    """``file`` without its layers in other denoisers than ``only``."""
    if only not in file.parts:
        raise InputError(f"'{_name(file)}' has no layers for the denoiser '{only}'.")
    kept = {part: layers for part, layers in file.parts.items() if part == only or part not in names}
    return file.with_parts(kept, file.flat)


def _joined(one: LoraFile, other: LoraFile) -> LoraFile:
    """Both halves as one adapter; its hash is that of both hashes in turn."""
    both = hashlib.sha256(f"{one.sha256}{other.sha256}".encode()).hexdigest()
    flat = one.flat or other.flat  # then no name may have dots
    parts = {
        part: {name.replace(".", "_") if flat else name: layer for name, layer in layers.items()}
        for part, layers in {**one.parts, **other.parts}.items()
    }
    return replace(one.with_parts(parts, flat), sha256=both)
