"""Read any supported adapter from a path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from adapters.errors import InputError
from adapters.files import WORDS
from adapters.formats.format import formats, recognise
from adapters.formats.header import CONFIG, PICKLED, WEIGHTS, Header, check_names, read_header
from adapters.formats.keys import refuse_foreign
from adapters.formats.lora import LoraFile
from adapters.formats.peft_directory import PREFIX, is_peft_directory
from adapters.formats.tensors import SUFFIXES, flat_table, load_pickle, pickled_shapes, sha256


def read(path: str | Path, hashed: Callable[[Path], str] = sha256) -> LoraFile:
    """The adapter at ``path``: a file, a PEFT directory, or a directory with exactly one adapter file in it.

    Args:
        hashed: computes the SHA-256 of a file or directory; callers who know it pass their own.

    Raises:
        InputError: the path does not exist, the format is unknown or refused, or the file is damaged or not finite.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise InputError(f"Adapter '{path}' does not exist.")
    head = header_of(place)
    format = recognise(head)
    if format is None or (format.name == "diffusers" and any(name.startswith(PREFIX) for name in head.shapes)):
        _refuse(head)
    chosen = format or formats()["diffusers"]  # its errors name the keys that are not understood
    made = chosen.read(head)
    return replace(made, path=made.path or head.path, sha256=hashed(head.path))


def header_of(place: Path) -> Header:
    """The header of the adapter at ``place``; for a pickle, with its whole content.

    Raises:
        InputError: there is no adapter file, or its header cannot be read.
    """
    if place.is_dir() and is_peft_directory(place):
        return Header(place, _peft_shapes(place), peft=True)
    file = _only_file(place) if place.is_dir() else place
    if file.name in WEIGHTS and (file.parent / CONFIG).is_file():
        return Header(file.parent, _peft_shapes(file.parent), peft=True)
    if not file.is_file():
        raise InputError(f"Adapter '{file}' is not a file.")
    if file.suffix == ".safetensors":
        try:
            return read_header(file)
        except InputError as error:
            raise InputError(f"Adapter file '{file}' is not a readable safetensors file: {error}.") from None
    if file.suffix in PICKLED:
        content = load_pickle(file)
        probe = Header(file, {}, content=content)
        if recognise(probe) is not None:  # nested tables
            return probe
        tensors = flat_table(content, file)
        check_names(tensors)
        return Header(file, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, content=content)
    for format in formats().values():
        if format.suffix == file.suffix and (head := format.header(file)) is not None:
            return head
    suffix = f"the suffix '{file.suffix}'" if file.suffix else "no suffix"
    known = sorted({*SUFFIXES, *(format.suffix for format in formats().values() if format.suffix)})
    raise InputError(f"'{file}' has {suffix}; an adapter is a PEFT folder or a file ending in {', '.join(known)}.")


def _peft_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a PEFT directory; empty if there are none, or they cannot be read."""
    file = next((file for name in WEIGHTS if (file := folder / name).is_file()), None)
    try:
        if file is None:
            return {}
        return pickled_shapes(file) if file.suffix in PICKLED else dict(read_header(file).shapes)
    except InputError:  # the reader of the tensors says what is wrong
        return {}


def _refuse(head: Header) -> None:
    """Raise :class:`InputError` if the names show what an unsupported file is."""
    source = f"'{head.path.name}'"
    refuse_foreign(head.shapes, source)
    if any(name.startswith(PREFIX) for name in head.shapes):
        raise InputError(
            f"{source} has PEFT's keys, but '{CONFIG}', which holds its alpha, is missing: copy the whole directory."
        )


def _only_file(folder: Path) -> Path:
    """The adapter file of a directory; diffusers' own name first, then safetensors, then pickles."""
    preferred = folder / "pytorch_lora_weights.safetensors"
    if preferred.is_file():
        return preferred
    for endings in ((".safetensors",), PICKLED):
        files = sorted(file for file in folder.iterdir() if file.suffix in endings and not file.match(f"*{WORDS}"))
        if len(files) == 1:
            return files[0]
        if files:
            raise InputError(f"'{folder}' contains several files ({', '.join(f.name for f in files[:5])}): name one.")
    raise InputError(f"'{folder}' contains no adapter file.")
