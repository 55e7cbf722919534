"""Finding adapters and base models in folders; what cannot be read is listed with the reason, never skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import assets
from adapters.errors import InputError
from studio import settings
from studio.library import cache, facts, smollm2
from studio.library.records import Record, Source

Kind = Literal["adapter", "base"]

PICKLES = (".pt", ".pth", ".ckpt", ".bin")
_DEPTH = 5


def records(kind: Kind) -> list[Record]:
    """All adapters, or all base models, by name; the person's own come first when names are equal."""
    found: dict[str, Record] = {}
    for root, source in roots(kind):
        for path in _candidates(root, kind):
            record = _record(path, kind, source, found)
            found[record.name] = record
    return sorted(found.values(), key=lambda record: record.name.lower())


def roots(kind: Kind) -> Iterator[tuple[Path, Source]]:
    """The folders searched, in the order in which they win a name."""
    own, *further = settings.adapter_folders() if kind == "adapter" else settings.base_folders()
    yield own, "library"
    for folder in further:
        yield folder, "folder"
    if kind == "base" and smollm2.ready():
        yield smollm2.folder().parent, "embedded"
    try:
        yield assets.path("adapters" if kind == "adapter" else "models"), "embedded"
    except FileNotFoundError:
        return


def record(path: Path, kind: Kind, name: str | None = None, source: Source = "folder") -> Record:
    """The record of one file or folder, wherever it lies."""
    stamp = ""
    try:
        stamp = _stamp(path)
        size = _size(path)
        gathered = cache.facts(path, f"{kind} {stamp}", lambda: _gather(path, kind))
    except OSError as error:
        size, gathered = 0, {"problem": f"cannot be read: {error.strerror}"}
    values: dict[str, Any] = dict(gathered)
    for field in ("targets", "triggers"):
        values[field] = tuple(values.get(field) or ())
    return Record(
        name=name or own_name(path), path=path, kind=kind, source=source, size=size, preview=facts.preview(path),
        sha256=_known_hash(path, kind), modified=path.stat().st_mtime if stamp else 0.0, **values,
    )  # fmt: skip


def own_name(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


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


def _candidates(root: Path, kind: Kind, depth: int = 0) -> Iterator[Path]:
    """Files and folders below ``root`` that are, or pretend to be, an adapter or a base."""
    for entry in _entries(root):
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            if facts.is_companion(entry.name):
                continue
            if entry.suffix == ".safetensors" or (kind == "adapter" and entry.suffix in PICKLES):
                yield entry
        elif entry.is_dir():
            if _whole(entry, kind):
                yield entry
            elif depth < _DEPTH and not _foreign(entry):
                yield from _candidates(entry, kind, depth + 1)


def _entries(folder: Path) -> Iterable[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _whole(folder: Path, kind: Kind) -> bool:
    """Whether the folder is one adapter (or base) rather than a place that holds some."""
    if kind == "base":
        return (folder / "model_index.json").is_file() or facts.is_language_model(folder)
    if (folder / "adapter_config.json").is_file():
        return True
    names = [entry.name for entry in _entries(folder)]
    weights = [name for name in names if name.endswith(".safetensors") and not facts.is_companion(name)]
    cards = {"card.yaml", "card.json", "card.md", "README.md", "preview.png"}
    return len(weights) == 1 and (bool(cards & set(names)) or weights[0] == "pytorch_lora_weights.safetensors")


def _foreign(folder: Path) -> bool:
    """A pipeline or a checkpoint folder: what lies inside is no adapter of its own."""
    return (folder / "model_index.json").is_file() or (folder / "config.json").is_file()


def _stamp(path: Path) -> str:
    """Changes when the thing changes; of folders only the top level is looked at."""
    files = [path] if path.is_file() else [entry for entry in _entries(path) if entry.is_file()]
    beside = [path.with_suffix(ending) for ending in (".yaml", ".json", ".md")] if path.is_file() else []
    states = [(file.name, file.stat()) for file in [*files, *(card for card in beside if card.is_file())]]
    return ";".join(f"{name} {state.st_mtime_ns} {state.st_size}" for name, state in states)


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
