"""Names of adapters -> what the engine computes with: any format the studio reads, read when first asked for.

Names come from folders and from the library. A file that has changed since is read again, under a new key, so requests
that run with the old one finish with it. What cannot be served is refused by name, with the reason; nothing is served
in part.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import FamilyError, InputError, nearest
from adapters.formats.foreign_mixture import is_foreign
from adapters.formats.lora import MODEL, LoraLayer
from adapters.formats.mixture import mixture_config
from adapters.serving.packing import PackedAdapter, pack
from pipelines.language.adapters import read_fitting
from studio.conversation.templates import Spoken, spoken
from studio.library import Record, resolve, scan
from studio.serving.engine import Engine

AUTO = "auto"
"""The name under which the server chooses the adapter by the request."""

_SUMS = 64
"""Sums of adapters at strengths that stay loaded."""

_log = logging.getLogger(__name__)


class UnknownModelError(InputError):
    """A name that is neither the base nor an adapter."""


@dataclass(frozen=True)
class Loaded:
    """An adapter that can be asked.

    Attributes:
        key: in the engine, new for every version of the file.
        mixture: whether it is a mixture of experts, with a forward pass of its own.
        spoken: the chat template of its training.
        stamp: of its files when they were read; "" = never read again.
    """

    name: str
    path: Path
    key: tuple[str, int]
    mixture: bool
    spoken: Spoken
    stamp: str = ""
    rank: int | None = None
    created: float = 0.0


@dataclass(frozen=True)
class Mix:
    """What a request computes with: one adapter, a sum of LoRAs, a mixture beside which they act, or nothing.

    Attributes:
        adapter, mixture: keys for the engine.
        label: for people.
        members: the adapters in it.
    """

    adapter: Any = None
    mixture: str = ""
    label: str = "base"
    members: tuple[Loaded, ...] = ()

    @property
    def template(self) -> str | None:
        """The chat template of the first adapter that has one of its own; None = the base's."""
        return next((one.spoken.template for one in self.members if one.spoken.template is not None), None)


@dataclass
class Adapters:
    """The adapters of one engine.

    Args:
        base: the base's name.
        folders: whose adapters are served by their names; new ones are found without a restart.
        library: also those of the library that are for language models.
    """

    engine: Engine
    base: str
    folders: Sequence[Path] = ()
    library: bool = False
    _loaded: dict[str, Loaded] = field(default_factory=dict)
    _sums: OrderedDict[Any, Any] = field(default_factory=OrderedDict)
    _versions: Any = field(default_factory=itertools.count)
    _lock: Any = field(default_factory=threading.RLock)
    _records: Sequence[Record] = ()
    _watched: tuple[list[Path], list[Path]] = ([], [])
    _state: Any = None

    @property
    def loaded(self) -> list[Loaded]:
        with self._lock:
            return list(self._loaded.values())

    def records(self) -> Sequence[Record]:
        """Adapters that can be asked for by name, loaded or not; the same object until a folder has changed."""
        with self._lock:
            roots = self._roots()
            if self._state is None or self._state != self._state_of(roots):
                self._watched = _searched(roots)
                state = self._state_of(roots)
                self._records = self._read()
                self._state = state if _searched(roots) == self._watched else None  # else it changed meanwhile
            return self._records

    def _roots(self) -> list[Path]:
        return [*self.folders, *([root for root, _ in scan.roots("adapter")] if self.library else [])]

    def _state_of(self, roots: Sequence[Path]) -> tuple[Any, ...]:
        """Changes when an adapter comes, changes or goes: a new one changes the folder that it is in."""
        folders, found = self._watched
        return tuple(roots), tuple(map(_changed, folders)), tuple(map(_stamp, found))

    def _read(self) -> list[Record]:
        found = {record.name: record for folder in reversed(self.folders) for record in scan.in_folder(folder)}
        if self.library:
            found = {record.name: record for record in resolve.adapters()} | found
        return [record for _, record in sorted(found.items()) if not record.problem and record.family == "language"]

    def names(self) -> list[str]:
        """Every name that can be asked for besides the base, sorted."""
        return sorted({one.name for one in self.loaded} | {record.name for record in self.records()})

    # ------------------------------------------------------------------------------------------ finding
    def find(self, name: str) -> Loaded:
        """The adapter called ``name``, read if that is necessary.

        Raises:
            UnknownModelError: there is none.
            InputError: it cannot be served.
        """
        with self._lock:
            known = self._loaded.get(name)
            if known is not None and (not known.stamp or known.stamp == _stamp(known.path)):
                return known
            path = self._path(name)
            if path is None:
                if known is not None:
                    self.remove(name)
                raise UnknownModelError(
                    f"There is no model '{name}'{nearest(name, [self.base, *self.names()])}: ask for '{self.base}' or "
                    "for an adapter by its name."
                )
            if known is not None:
                self.remove(name)
            return self.add(name, path, watched=True)

    def _path(self, name: str) -> Path | None:
        """Where an adapter of this name is; None if nowhere."""
        if name and not set(name) & set("/\\\0") and name not in (".", ".."):
            for folder in self.folders:
                for place in (folder / name, folder / f"{name}.safetensors"):
                    if place.exists():
                        return place
        return next((record.path for record in self.records() if record.name == name), None)

    def pin(self, name: str) -> Loaded:
        """Read ``name`` and keep it in the pool.

        Raises:
            InputError: there is none, it is loaded already, or there is no room.
        """
        path = self._path(name)
        if path is None:
            raise UnknownModelError(f"There is no adapter '{name}'{nearest(name, self.names())}.")
        return self.add(name, path, pinned=True)

    def add(self, name: str, path: Path, pinned: bool = False, watched: bool = False) -> Loaded:
        """Read the adapter at ``path`` and serve it as ``name``.

        Args:
            watched: read it again when its files change.

        Raises:
            InputError: the name cannot be used or is taken, or the adapter cannot be served.
        """
        self.check_name(name)
        return self.load(name, path, pinned, watched)

    def load(self, name: str, path: Path, pinned: bool = False, watched: bool = False) -> Loaded:
        """As :meth:`add`, under any name; for those who ask from this process, not over a network."""
        with self._lock:
            if name in self._loaded:
                raise InputError(f"The adapter '{name}' has already been loaded: unload it first, or load it in place.")
            path = path.expanduser()
            stamp = _stamp(path) if watched else ""
            key = (name, next(self._versions))
            mixture = mixture_config(path) is not None or is_foreign(path)
            rank = None
            if mixture:
                self.engine.add_mixture(_mixture_key(key), path)
            else:
                packed = self._packed(name, [(self._layers(name, path), 1.0)])
                rank = packed.rank
                self.engine.add(((key, 1.0),), packed, pinned)
            recipe = scan.record(path, "adapter").recipe
            made = Loaded(name, path, key, mixture, spoken(path, recipe), stamp, rank)
            self._loaded[name] = made
            return made

    def add_layers(self, name: str, layers: Mapping[str, LoraLayer], pinned: bool = False) -> Loaded:
        """Serve an adapter from memory: module path -> layer, fitted to the base.

        Raises:
            InputError: as :meth:`add`.
        """
        self.check_name(name)
        with self._lock:
            if name in self._loaded:
                raise InputError(f"The adapter '{name}' has already been loaded: unload it first.")
            key = (name, next(self._versions))
            packed = self._packed(name, [(layers, 1.0)])
            self.engine.add(((key, 1.0),), packed, pinned)
            made = self._loaded[name] = Loaded(name, Path(), key, False, Spoken(), "", packed.rank)
            return made

    def remove(self, name: str) -> None:
        """Serve ``name`` no longer; requests that were accepted are answered.

        Raises:
            UnknownModelError: it is not loaded.
        """
        with self._lock:
            if name not in self._loaded:
                raise UnknownModelError(f"The adapter '{name}' is not loaded{nearest(name, self._loaded)}.")
            gone = self._loaded.pop(name)
            for key in [key for key in self._sums if any(part == gone.key for part, _ in key)]:
                self.engine.remove(key)
                del self._sums[key]
            self.engine.remove(_mixture_key(gone.key) if gone.mixture else ((gone.key, 1.0),))

    def check_name(self, name: str) -> None:
        """Raise :class:`InputError` for a name that an adapter cannot have."""
        if not name.strip() or set(name) & set("/\\\0\n"):
            raise InputError(f"An adapter cannot be called '{name}': use letters, digits, '-', '_' and '.'.")
        if name in (self.base, AUTO, "base", ".", ".."):
            raise InputError(f"The name '{name}' has a meaning of its own here: choose another.")

    def _layers(self, name: str, path: Path) -> Mapping[str, LoraLayer]:
        file = read_fitting(path, self.engine.base.model, self.base)
        if file.config.get("task_type") not in (None, "CAUSAL_LM"):
            raise FamilyError(f"The adapter '{name}' is for {file.config['task_type']}, not for writing text.")
        return file.parts[MODEL]

    def _packed(self, name: str, parts: Sequence[tuple[Mapping[str, LoraLayer], float]]) -> PackedAdapter:
        pool = self.engine.pool
        return pack(parts, self.engine.base.model, pool.page_elems, pool.pages.dtype, self.engine.config.max_rank, name)

    # ------------------------------------------------------------------------------------------ asking
    def mix(self, weights: Mapping[str, float]) -> Mix:
        """What a request for these adapters at these strengths computes with.

        A DoRA adapter is normalised at its strength. A mixture of experts is on or off, and at most one is on.

        Raises:
            UnknownModelError: an adapter that there is not.
            InputError: one that cannot be served, or a strength that a mixture does not have.
        """
        with self._lock:
            chosen = [(self.find(name), weight) for name, weight in weights.items() if weight]
            mixtures = [one for one, _ in chosen if one.mixture]
            for one, weight in chosen:
                if one.mixture and weight != 1:
                    raise InputError(
                        f"'{one.name}' is a mixture of experts, which has no strengths between 0 and 1: use 1, not "
                        f"{weight:g}."
                    )
            if len(mixtures) > 1:
                raise InputError(
                    f"'{mixtures[0].name}' and '{mixtures[1].name}' are both mixtures of experts: use one at a time."
                )
            loras = [(one, weight) for one, weight in chosen if not one.mixture]
            label = "+".join(one.name if weight == 1 else f"{one.name}:{weight:g}" for one, weight in chosen)
            return Mix(
                self._sum(loras), _mixture_key(mixtures[0].key) if mixtures else "", label or "base",
                tuple(one for one, _ in chosen),
            )  # fmt: skip

    def _sum(self, loras: Sequence[tuple[Loaded, float]]) -> Any:
        """The key of a sum of LoRAs, which is made and kept if it is not one adapter at strength 1."""
        if not loras:
            return None
        key = tuple((one.key, float(weight)) for one, weight in loras)
        if len(key) == 1 and key[0][1] == 1:
            return key
        if self.engine.revive(key):
            self._sums[key] = None
            self._sums.move_to_end(key)
            return key
        label = " + ".join(f"{one.name}:{weight:g}" for one, weight in loras)
        if any(one.path == Path() for one, _ in loras):
            raise InputError(f"'{label}' cannot be made: an adapter from memory has strength 1 only, by itself.")
        packed = self._packed(label, [(self._layers(one.name, one.path), weight) for one, weight in loras])
        self.engine.add(key, packed)
        self._sums[key] = None
        while len(self._sums) > _SUMS:
            self.engine.remove(self._sums.popitem(last=False)[0])
        return key


def _mixture_key(key: tuple[str, int]) -> str:
    return f"{key[0]}#{key[1]}"


def _searched(roots: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The folders below ``roots``, and the adapters in them."""
    pairs = [scan.searched(root) for root in roots]
    return [one for folders, _ in pairs for one in folders], [one for _, found in pairs for one in found]


def _changed(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def _stamp(path: Path) -> str:
    try:
        return scan.stamp(path)
    except OSError:
        return "gone"
