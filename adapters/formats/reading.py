"""Read any supported adapter: say where it is, get its canonical form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from adapters.errors import InputError
from adapters.files import WORDS
from adapters.formats.format import formats, recognise
from adapters.formats.header import CONFIG, PICKLED, Header, check_names, read_header
from adapters.formats.keys import refuse_foreign
from adapters.formats.lora import LoraFile
from adapters.formats.peft_directory import PREFIX, WEIGHTS, is_peft_directory
from adapters.formats.tensors import SUFFIXES, flat_table, load_pickle, sha256


def read(path: str | Path, hashed: Callable[[Path], str] = sha256) -> LoraFile:
    """The adapter at ``path``: a file, a PEFT directory, or a directory with exactly one adapter file in it.

    Args:
        hashed: gives the SHA-256 of a file or directory, for callers who know it already.

    Raises:
        InputError: nothing there, no known format, a format we refuse, damaged or non-finite numbers.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise InputError(f"Adapter '{path}' does not exist.")
    head = header_of(place)
    format = recognise(head)
    if format is None or (format.name == "diffusers" and any(name.startswith(PREFIX) for name in head.shapes)):
        _refuse(head)
    chosen = format or formats()["diffusers"]  # which says what it does not understand
    made = chosen.read(head)
    return replace(made, path=made.path or head.path, sha256=hashed(head.path))


def header_of(place: Path) -> Header:
    """The head of the adapter at ``place``; of a pickle with all that is in it.

    Raises:
        InputError: no adapter file there, or one whose head cannot be read.
    """
    if place.is_dir() and is_peft_directory(place):
        return Header(place, {}, peft=True)
    file = _only_file(place) if place.is_dir() else place
    if file.name in WEIGHTS and (file.parent / CONFIG).is_file():
        return Header(file.parent, {}, peft=True)
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
    ending = f"the ending '{file.suffix}'" if file.suffix else "no ending"
    known = sorted({*SUFFIXES, *(format.suffix for format in formats().values() if format.suffix)})
    raise InputError(f"'{file}' has {ending}; an adapter is a folder of PEFT or a file ending in {', '.join(known)}.")


def _refuse(head: Header) -> None:
    """Say what a file is that no format reads, if its names tell."""
    source = f"'{head.path.name}'"
    refuse_foreign(head.shapes, source)
    if any(name.startswith(PREFIX) for name in head.shapes):
        raise InputError(
            f"{source} has PEFT's keys, but '{CONFIG}' with its alpha is missing beside it: copy the whole directory."
        )


def _only_file(folder: Path) -> Path:
    """The adapter file of a directory; safetensors before pickles, diffusers' own name before others."""
    preferred = folder / "pytorch_lora_weights.safetensors"
    if preferred.is_file():
        return preferred
    for endings in ((".safetensors",), PICKLED):
        files = sorted(file for file in folder.iterdir() if file.suffix in endings and not file.match(f"*{WORDS}"))
        if len(files) == 1:
            return files[0]
        if files:
            raise InputError(f"'{folder}' holds several files ({', '.join(f.name for f in files[:5])}): name one.")
    raise InputError(f"'{folder}' holds no adapter file.")
