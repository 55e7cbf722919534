"""Read any supported adapter: say where it is, get its canonical form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from adapters.errors import InputError
from adapters.files import WORDS
from adapters.formats.diffusers_file import parse_diffusers
from adapters.formats.ed_lora import read_ed_lora
from adapters.formats.keys import refuse_foreign
from adapters.formats.kohya import is_kohya, parse_kohya
from adapters.formats.lora import LoraFile
from adapters.formats.peft_directory import CONFIG, PREFIX, WEIGHTS, is_peft_directory, read_peft
from adapters.formats.tensors import PICKLED, check_finite, read_tensors, sha256
from adapters.formats.words import read_beside, split_words


def read(path: str | Path) -> LoraFile:
    """The adapter at ``path``: a file, a PEFT directory, or a directory with exactly one adapter file in it.

    Raises:
        InputError: nothing there, no known format, a format we refuse, damaged or non-finite numbers.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise InputError(f"Adapter '{path}' does not exist.")
    if place.is_dir() and is_peft_directory(place):
        return replace(read_peft(place), sha256=sha256(place))
    file = _only_file(place) if place.is_dir() else place
    if file.name in WEIGHTS and (file.parent / CONFIG).is_file():
        return replace(read_peft(file.parent), sha256=sha256(file.parent))
    if ed_lora := read_ed_lora(file):
        return ed_lora
    tensors, metadata = read_tensors(file)
    source = f"'{file.name}'"
    if not tensors:
        raise InputError(f"{source} holds no tensors.")
    refuse_foreign(tensors, source)
    check_finite(tensors, source)
    tensors, words = split_words(tensors, source)
    if not tensors:
        raise InputError(f"{source} holds words ({', '.join(words)}) and no layers: it is no adapter but an embedding.")
    original = is_kohya(tensors)
    if not original and any(key.startswith(PREFIX) for key in tensors):
        raise InputError(
            f"{source} has PEFT's keys, but '{CONFIG}' with its alpha is missing beside it: copy the whole directory."
        )
    parse = parse_kohya if original else parse_diffusers
    made = replace(parse(tensors, metadata, source), path=file, sha256=sha256(file), words=words)
    return read_beside(made, file)


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
