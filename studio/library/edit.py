"""Changing the library: import, rename, move to the trash and back."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from adapters import files
from adapters.errors import InputError
from pipelines.diffusion.families import FAMILIES
from studio import settings
from studio.composition import distilled_adapters
from studio.library import cache, facts, hub, scan
from studio.library.records import Record
from studio.library.resolve import HUB_ID, find

_NAME = re.compile(r"[^\W.][\w .+()-]*")


def show(name: str, kind: scan.Kind = "adapter") -> Record:
    """One record with its sha256, which reads the whole file once."""
    record = find(name, kind)
    if not record.problem:
        sha256(record.path, kind)
    return find(name, kind)


def sha256(path: Path, kind: scan.Kind = "adapter") -> str:
    """The hash of an adapter's weights, or of a base model's files; remembered until they change."""
    return cache.sha256(facts.weight_file(path) if kind == "adapter" else path)


def places(sha256: str, kind: scan.Kind = "adapter") -> list[Path]:
    """Where an adapter or base model with this hash was seen on this machine; it may have changed since."""
    found = cache.places(sha256)
    if kind == "base":
        return found
    return [path.parent if (path.parent / "adapter_config.json").is_file() else path for path in found]


def import_adapter(source: str | os.PathLike[str], name: str | None = None) -> Record:
    """Copy an adapter into the library: a file, a folder, or a hub id (``owner/repo`` or ``owner/repo/file``).

    Raises:
        InputError: it does not exist, is not an adapter, cannot be fetched, or the name is taken.
    """
    return _import(source, name, "adapter")


def import_base(source: str | os.PathLike[str], name: str | None = None) -> Record:
    """Copy a base model into the library: a pipeline folder, a single file, or a hub id.

    Raises:
        InputError: as :func:`import_adapter`.
    """
    return _import(source, name, "base")


def _import(source: str | os.PathLike[str], name: str | None, kind: scan.Kind) -> Record:
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.exists():
        return _copied(path.absolute(), name, kind, text)
    if not HUB_ID.match(text):
        raise InputError(f"'{text}' is neither a file, a folder nor a hub id (owner/name).")
    name = name or text.split("/")[1]
    if kind == "adapter":
        return _copied(hub.fetch_adapter(text), name, kind, text)
    return _downloaded_base(text, name)


_OTHERWISE = {
    "base": "a base model: import it with --base, or on the Library page under Base models.",
    "adapter": "an adapter: import it without --base, or on the Library page under Adapters.",
}


def _copied(path: Path, name: str | None, kind: scan.Kind, shown: str) -> Record:
    checked = scan.record(path, kind)
    if checked.problem:
        other = scan.record(path, "base" if kind == "adapter" else "adapter")
        way = "" if other.problem else f" It is {_OTHERWISE[other.kind]}"
        raise InputError(f"'{shown}' cannot be imported: {checked.problem}.{way}")
    if kind == "adapter" and (pair := _pair(path)):
        return _copied_pair(path, pair, name)
    target = _place(name or scan.own_name(path), path, kind)
    _copy(path, target)
    return _record_at(target, kind)


def _pair(path: Path) -> dict[str, Path]:
    """The files of an adapter of two files, one per denoiser of its family (:mod:`pipelines.diffusion.halves`)."""
    several = [family.denoisers for family in FAMILIES.values() if len(family.denoisers) > 1]
    if not any(one.word in path.name.lower() for denoisers in several for one in denoisers):
        return {}
    from pipelines.diffusion import halves  # loads torch

    return next((found for denoisers in several if (found := halves.together(path, denoisers))), {})


def _copied_pair(path: Path, pair: dict[str, Path], name: str | None) -> Record:
    """Copy both files; returns the record of ``path``."""
    targets = {
        place: _place(f"{name}_{word}_noise" if name else scan.own_name(place), place, "adapter")
        for word, place in pair.items()
    }
    for place, target in targets.items():
        _copy(place, target)
    return _record_at(targets[path], "adapter")


def _downloaded_base(repo: str, name: str) -> Record:
    """Fetch a base model straight into the library, under a hidden name until it is complete."""
    _check_name(name, "base")
    root = settings.base_folders()[0]
    draft = hub.fetch_base(repo, root / f".{repo.replace('/', '--')}")
    shutil.rmtree(draft / ".cache", ignore_errors=True)
    draft.rename(root / name)
    return _record_at(root / name, "base")


def rename(name: str, new_name: str, kind: scan.Kind = "adapter") -> Record:
    """Rename an adapter (or base) and the files of the same name beside it.

    A guidance embedding keeps its name, by which the adapter finds it.

    Raises:
        InputError: it does not exist, it ships with the studio, or the new name is taken or not allowed.
    """
    record = _changeable(name, kind)
    _check_name(new_name, kind)
    moves = [(file, _renamed(file, record.path, new_name)) for file in _belongings(record.path)]
    for old, new in moves:
        old.rename(new)
    return _record_at(moves[0][1], kind)


def set_preview(record: Record, picture: Path) -> Path:
    """Save ``picture`` as an adapter's preview (PNG, at most 512 pixels a side); returns its path."""
    from pipelines.pictures import open_picture

    place = record.path / "preview.png" if record.path.is_dir() else record.path.with_suffix(".png")
    small = open_picture(picture)
    small.thumbnail((512, 512))
    files.write(place, lambda part: small.save(part, format="PNG"), sync=False)
    return place


@dataclass(frozen=True)
class Trashed:
    """Something in the trash."""

    id: str
    name: str
    kind: scan.Kind
    original: Path
    """Where it was."""
    deleted: float
    folder: Path


def trash(name: str, kind: scan.Kind = "adapter") -> Trashed:
    """Move an adapter (or base) to the trash, from which :func:`restore` brings it back.

    Raises:
        InputError: it does not exist, or it ships with the studio.
    """
    record = _changeable(name, kind)
    now = time.time()
    place = settings.folder("trash", f"{datetime.fromtimestamp(now):%y%m%d-%H%M%S}-{secrets.token_hex(2)}")
    entry = {"name": record.name, "kind": kind, "original": str(record.path), "deleted": now}
    (place / "files").mkdir()
    for file in [*_belongings(record.path), *_own_embedding(record)]:
        shutil.move(file, place / "files" / file.name)
    with suppress(InputError):  # on a full disk files can only be renamed; :func:`_trashed` manages without
        files.write_text(place / "entry.json", json.dumps(entry, indent=1))
    return _trashed(place)


def _own_embedding(record: Record) -> list[Path]:
    """The guidance embedding beside an adapter file, unless another adapter needs it too."""
    found = distilled_adapters.companion(record.path) if record.path.is_file() else None
    others = (item.path for item in scan.records("adapter") if item.path != record.path)
    if found is None or any(distilled_adapters.companion(path) == found for path in others):
        return []
    return [found]


def trashed() -> list[Trashed]:
    """What is in the trash, newest first."""
    places = [place for place in settings.folder("trash").iterdir() if any(place.glob("files/*"))]
    return sorted(map(_trashed, places), key=lambda item: item.deleted, reverse=True)


def restore(name_or_id: str) -> Record:
    """Move the newest item of this name (or id) from the trash back to where it was.

    Raises:
        InputError: it is not in the trash, or its place is taken.
    """
    found = next((item for item in trashed() if name_or_id in (item.id, item.name)), None)
    if found is None:
        raise InputError(f"There is no '{name_or_id}' in the trash: see  studio library trash.")
    if found.original.exists():
        raise InputError(f"'{found.original}' exists again: rename that one first.")
    found.original.parent.mkdir(parents=True, exist_ok=True)
    for file in (found.folder / "files").iterdir():
        place = found.original.parent / file.name
        if not (distilled_adapters.EMBEDDING in file.name and place.exists()):  # same name, same contents
            shutil.move(file, place)
    shutil.rmtree(found.folder)
    return _record_at(found.original, found.kind)


def empty_trash() -> int:
    """Delete everything in the trash for good; returns how many items it held."""
    items = trashed()
    for item in items:
        shutil.rmtree(item.folder)
    return len(items)


def _trashed(place: Path) -> Trashed:
    try:
        entry = json.loads((place / "entry.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        entry = _guessed(place)
    return Trashed(place.name, entry["name"], entry["kind"], Path(entry["original"]), entry["deleted"], place)


def _guessed(place: Path) -> dict[str, Any]:
    """The entry of an item trashed while the disk was full: it goes back to the library's own folder."""
    found = sorted((place / "files").iterdir(), key=lambda file: (file.suffix not in _WEIGHTS, file.name))[0]
    kind: scan.Kind = "base" if (found / "model_index.json").is_file() or facts.is_language_model(found) else "adapter"
    root = next(iter(scan.roots(kind)))[0]
    return {"name": scan.own_name(found), "kind": kind, "original": root / found.name, "deleted": place.stat().st_mtime}


_WEIGHTS = (".safetensors", *scan.PICKLES)


def _changeable(name: str, kind: scan.Kind) -> Record:
    record = find(name, kind)
    if record.read_only:
        raise InputError(f"'{name}' ships with Adapter Studio and cannot be changed: import a copy of {record.path}.")
    return record


def _place(name: str, source: Path, kind: scan.Kind) -> Path:
    """Where something called ``name`` goes in the library; raises :class:`InputError` when the name is taken."""
    _check_name(name, kind)
    root = next(iter(scan.roots(kind)))[0]
    return root / (name if source.is_dir() else name + source.suffix)


def _check_name(name: str, kind: scan.Kind) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(f"'{name}' is not a valid name: use letters, digits, spaces and . _ - + ( ).")
    if any(record.name.lower() == name.lower() for record in scan.records(kind)):
        raise InputError(f"The name '{name}' is taken: choose another (--name).")


def _copy(source: Path, target: Path) -> None:
    """Copy under a hidden name, then rename, so that a partial copy is never listed."""
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if source.is_dir():
            shutil.copytree(source, draft, ignore=shutil.ignore_patterns(".*"))
        else:
            shutil.copy2(source, draft)
            for file in _belongings(source)[1:]:
                shutil.copy2(file, target.parent / _renamed(file, source, target.stem).name)
            embedding = distilled_adapters.companion(source)
            if embedding is not None:
                shutil.copy2(embedding, target.parent / embedding.name)
        draft.replace(target)
    finally:
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink(missing_ok=True)


def _belongings(path: Path) -> list[Path]:
    """The item itself, and for a file its card, words and pictures of the same name."""
    endings = (".yaml", ".json", ".md", files.WORDS, *facts.PICTURES)
    beside = [path.with_suffix(ending) for ending in endings]
    beside += [path.with_name(f"{path.stem}.preview{ending}") for ending in facts.PICTURES]
    return [path] if path.is_dir() else [path, *(file for file in beside if file.is_file())]


def _renamed(file: Path, thing: Path, new_name: str) -> Path:
    if thing.is_dir():
        return file.with_name(new_name)
    return file.with_name(new_name + file.name.removeprefix(thing.stem))


def _record_at(path: Path, kind: scan.Kind) -> Record:
    return next(record for record in scan.records(kind) if record.path == path)
