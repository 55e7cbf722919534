"""Finding adapters and base models in folders; what cannot be read is listed with the reason, never skipped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import assets
from adapters.errors import InputError
from adapters.formats.format import formats
from adapters.formats.header import PICKLED
from studio import settings
from studio.library import cache, facts, packaged
from studio.library.records import Record, Source
from studio.printable import without_bytes

Kind = Literal["adapter", "base"]

_log = logging.getLogger(__name__)

PICKLES = PICKLED
_DEPTH = 5


def records(kind: Kind) -> list[Record]:
    """All adapters, or all base models, by name; of equal names the user's own keeps it, others get "-2", "-3"."""
    found: dict[str, Record] = {}
    for root, source in roots(kind):
        for path in _candidates(root, kind):
            record = _record(path, kind, source, found)
            found[record.name] = record
    return sorted(found.values(), key=lambda record: record.name.lower())


def in_folder(root: Path, kind: Kind = "adapter") -> list[Record]:
    """All adapters, or all base models, below one folder, by name."""
    found: dict[str, Record] = {}
    for path in _candidates(root, kind):
        record = _record(path, kind, "folder", found)
        found[record.name] = record
    return sorted(found.values(), key=lambda record: record.name.lower())


def searched(root: Path, kind: Kind = "adapter") -> tuple[list[Path], list[Path]]:
    """The folders that :func:`in_folder` looks into, and what it finds there; nothing is opened."""
    seen: dict[tuple[int, int], Path] = {}
    found = list(_candidates(root, kind, seen=seen))
    return list(seen.values()), found


def stamp(path: Path) -> str:
    """Changes when the file or folder changes.

    Raises:
        OSError: it is gone.
    """
    path.stat()
    return _stamp(path)


def roots(kind: Kind) -> Iterator[tuple[Path, Source]]:
    """The folders searched, in order of precedence."""
    own, *further = settings.adapter_folders() if kind == "adapter" else settings.base_folders()
    yield own, "library"
    for folder in further:
        yield folder, "folder"
    unpacked = [one.folder.parent for one in packaged.known().values() if kind == "base" and one.ready]
    for folder in dict.fromkeys(unpacked):
        yield folder, "embedded"
    try:
        yield assets.path("adapters" if kind == "adapter" else "models"), "embedded"
    except FileNotFoundError:
        return


def record(path: Path, kind: Kind, name: str | None = None, source: Source = "folder") -> Record:
    """The record of one file or folder, wherever it is."""
    stamp, size, modified = "", 0, 0.0
    try:
        stamp = _stamp(path)
        size, modified = _size(path), path.stat().st_mtime
        gathered = cache.facts(path, f"{kind} {stamp}", lambda: _gather(path, kind))
    except OSError as error:
        gathered = {"problem": f"cannot be read: {error.strerror}"}
    values: dict[str, Any] = dict(gathered)
    for field in ("targets", "triggers"):
        values[field] = tuple(values.get(field) or ())
    return Record(
        name=name or own_name(path), path=path, kind=kind, source=source, size=size, preview=facts.preview(path),
        sha256=_known_hash(path, kind), modified=modified, **values,
    )  # fmt: skip


def own_name(path: Path) -> str:
    """The name an adapter has from its file or folder; bytes that are not UTF-8 are written as ``\\xff``."""
    return without_bytes(path.name if path.is_dir() else path.stem)


def _known_hash(path: Path, kind: Kind) -> str | None:
    try:
        return cache.known_sha256(facts.weight_file(path) if kind == "adapter" else path)
    except (OSError, InputError):
        return None


def _record(path: Path, kind: Kind, source: Source, taken: dict[str, Record]) -> Record:
    name = own_name(path)
    number = 2
    while name in taken:
        name = f"{own_name(path)}-{number}"
        number += 1
    return record(path, kind, name, source)


def _gather(path: Path, kind: Kind) -> dict[str, Any]:
    gather: Callable[[Path], dict[str, Any]] = facts.adapter if kind == "adapter" else facts.base
    try:
        return gather(path)
    except InputError as error:
        return {"problem": str(error)}
    except OSError:
        raise
    except Exception as error:  # one odd file must not break the list
        _log.exception("unexpected while reading the head of %r", path)
        return {"problem": f"unexpected {type(error).__name__} while reading it"}


def _candidates(
    root: Path, kind: Kind, depth: int = 0, seen: dict[tuple[int, int], Path] | None = None
) -> Iterator[Path]:
    """Files and folders below ``root`` that are, or look like, an adapter or a base; each linked folder once."""
    seen = {} if seen is None else seen
    if not _first_visit(root, seen):
        return
    for entry in _entries(root):
        if entry.name.startswith("."):
            continue
        if _is_file(entry):
            if facts.is_companion(entry.name):
                continue
            if entry.suffix in (_suffixes() if kind == "adapter" else (".safetensors",)):
                yield entry
        elif _is_folder(entry):
            if _whole(entry, kind):
                yield entry
            elif depth < _DEPTH and not _foreign(entry):
                yield from _candidates(entry, kind, depth + 1, seen)


def _suffixes() -> tuple[str, ...]:
    """The extensions of adapter files."""
    return (".safetensors", *PICKLES, *(one.suffix for one in formats().values() if one.suffix))


def _first_visit(folder: Path, seen: dict[tuple[int, int], Path]) -> bool:
    try:
        state = folder.stat()
    except OSError:
        return False
    place = (state.st_dev, state.st_ino)
    if place in seen:
        return False
    seen[place] = folder
    return True


def _is_file(path: Path) -> bool:
    """Whether it is an ordinary file; False if that cannot be told."""
    try:
        return path.is_file()
    except OSError:
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _entries(folder: Path) -> Iterable[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _whole(folder: Path, kind: Kind) -> bool:
    """Whether the folder is one adapter (or base) rather than a place that holds some."""
    if kind == "base":
        known = any(is_one(folder) for is_one in facts.TRANSFORMERS)
        return known or (folder / "model_index.json").is_file()
    if any((folder / one.mark).is_file() for one in formats().values() if one.mark):
        return True
    names = [entry.name for entry in _entries(folder)]
    weights = [name for name in names if name.endswith(".safetensors") and not facts.is_companion(name)]
    cards = {"card.yaml", "card.json", "card.md", "README.md", "preview.png"}
    return len(weights) == 1 and (bool(cards & set(names)) or weights[0] == "pytorch_lora_weights.safetensors")


def _foreign(folder: Path) -> bool:
    """Whether it is a pipeline or checkpoint folder: nothing inside is an adapter of its own."""
    return (folder / "model_index.json").is_file() or (folder / "config.json").is_file()


def _stamp(path: Path) -> str:
    """Changes when the file or folder changes; only a folder's top level counts."""
    files = [path] if path.is_file() else [entry for entry in _entries(path) if _is_file(entry)]
    beside = [path.with_suffix(ending) for ending in (".yaml", ".json", ".md")] if path.is_file() else []
    states = [(without_bytes(file.name), file.stat()) for file in [*files, *filter(_is_file, beside)]]
    return ";".join(f"{name} {state.st_mtime_ns} {state.st_size}" for name, state in states)


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
