"""Finds the adapter or base model that a name, path or hub id stands for."""

from __future__ import annotations

import re
from pathlib import Path

from adapters.errors import InputError, nearest
from studio.library import facts, packaged, scan, smollm2, whisper_tiny
from studio.library.records import Record

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def adapters() -> list[Record]:
    """All adapters the studio knows, by name."""
    return scan.records("adapter")


def bases() -> list[Record]:
    """All base models the studio knows, by name."""
    return scan.records("base")


def find(name: str, kind: scan.Kind = "adapter") -> Record:
    """The record called ``name``; raises :class:`InputError` naming the nearest one."""
    known = {record.name: record for record in scan.records(kind)}
    if name not in known:
        things = "adapter" if kind == "adapter" else "base model"
        raise InputError(
            f"There is no {things} '{name}' in the library{nearest(name, known)}: "
            "give a name from  studio library list, a path, or import one."
        )
    return known[name]


def resolve_adapter(name_or_path: str | Path) -> Path:
    """Path of an adapter: a name in the library, else a file or folder.

    Raises:
        InputError: there is neither, or it cannot be used.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    known = {record.name: record for record in adapters()}
    if text in known:
        return _usable(known[text]).path
    if path.exists():
        return _usable(scan.record(path.absolute(), "adapter")).path
    return _usable(find(text)).path


def resolve_base(name_or_path: str | Path) -> str:
    """What the pipeline loads: the path of a base in the library, another path, or a hub id unchanged.

    Raises:
        InputError: nothing has this name.
    """
    text = str(name_or_path)
    known = {record.name: record for record in bases()}
    if text in known:
        return str(_usable(known[text]).path)
    path = Path(text).expanduser()
    if path.exists():
        return str(_usable(scan.record(path.absolute(), "base")).path)
    if (unpacked := packaged.place(text)) is not None:
        return str(unpacked)
    if HUB_ID.fullmatch(text) and not text.endswith(".safetensors"):
        return text
    return str(find(text, "base").path)


def resolve_pipeline(name_or_path: str | Path) -> str:
    """As :func:`resolve_base`, for a base that draws pictures.

    Raises:
        InputError: nothing has this name, or it is a language model (which is not unpacked to find out).
    """
    writes = packaged.known().get(str(name_or_path))
    place = None if writes else resolve_base(name_or_path)
    if place is None or facts.is_language_model(Path(place)):
        kind = writes.kind if writes else "language model"
        raise InputError(f"'{name_or_path}' is a {kind}: pictures need a base such as tinymoji.")
    if facts.is_speech_model(Path(place)):
        raise InputError(f"'{name_or_path}' is a speech model: pictures need a base such as tinymoji.")
    if facts.is_vision_language_model(Path(place)):
        raise InputError(f"'{name_or_path}' looks at pictures, it does not draw them: choose a base such as tinymoji.")
    return place


def resolve_language(name_or_path: str | Path) -> str:
    """As :func:`resolve_base`, for a language model.

    Raises:
        InputError: there is nothing of this name, or it draws pictures.
    """
    known = packaged.known().get(str(name_or_path))
    place = "" if known and known.kind != "language model" else resolve_base(name_or_path)
    if (Path(place) / "model_index.json").is_file() or Path(place).is_file():
        raise InputError(f"'{name_or_path}' draws pictures: texts need a language model such as {smollm2.NAME}.")
    if not place or facts.is_speech_model(Path(place)):
        raise InputError(f"'{name_or_path}' is a speech model: texts need a language model such as {smollm2.NAME}.")
    return place


def resolve_rna(name_or_path: str | Path) -> str:
    """As :func:`resolve_base`, for a k-mer model of RNA, which is a folder on this computer.

    Raises:
        InputError: there is nothing of this name, or it has no k-mer vocabulary.
    """
    place = None if str(name_or_path) in packaged.known() else resolve_base(name_or_path)
    if place is not None and not Path(place).exists():
        raise InputError(f"'{name_or_path}' is not on this computer: fetch it with  studio library import --base.")
    if place is None or not facts.is_rna_model(Path(place)):
        raise InputError(
            f"'{name_or_path}' is no k-mer model of RNA (its vocabulary is another): choose one such as tinyrna."
        )
    return place


def resolve_vision_language(name_or_path: str | Path) -> str:
    """As :func:`resolve_base`, for a model that answers questions about pictures.

    Raises:
        InputError: there is nothing of this name, or it draws pictures, or does not look at them.
    """
    place = None if str(name_or_path) in packaged.known() else resolve_base(name_or_path)
    if place is None or (Path(place).exists() and not facts.is_vision_language_model(Path(place))):
        raise InputError(
            f"'{name_or_path}' does not look at pictures: choose a vision-language model such as tinysight."
        )
    return place


def resolve_speech(name_or_path: str | Path) -> str:
    """As :func:`resolve_base`, for a speech model (Whisper).

    Raises:
        InputError: there is nothing of this name, or it is another kind of model.
    """
    known = packaged.known().get(str(name_or_path))
    other = known is not None and known.kind != "speech model"
    place = "" if other else resolve_base(name_or_path)
    if other or (Path(place).exists() and not facts.is_speech_model(Path(place))):
        raise InputError(f"'{name_or_path}' does not write down speech: choose a Whisper such as {whisper_tiny.NAME}.")
    return place


def _usable(record: Record) -> Record:
    """The record, unless it has a problem; pickles are left to the loader, which reads only tensors from them."""
    if record.problem and record.path.suffix not in scan.PICKLES:
        raise InputError(f"The {record.kind} '{record.path}' cannot be used: {record.problem}.")
    return record
