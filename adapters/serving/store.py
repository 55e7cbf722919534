"""Adapters in host memory, and the ones among them that are in the pool.

An adapter that a running request uses stays. Others stay as long as nobody needs their pages: then the one that was
used longest ago goes first (the official program drops all of them after every batch). Pinned ones stay always.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.errors import InputError
from adapters.serving.packing import PackedAdapter
from adapters.serving.pool import Ids, PagePool

Key = Hashable


@dataclass(eq=False)
class Resident:
    """An adapter in the pool.

    Attributes:
        ids: (count,) its pages, in the order of the packed adapter.
        users: running requests that need it.
        copied: on CUDA, when the copy of another stream is complete.
    """

    key: Key
    packed: PackedAdapter
    ids: Ids
    users: int = 0
    copied: torch.cuda.Event | None = None


@dataclass
class StoreCounts:
    """What has happened so far."""

    loads: int = 0
    evictions: int = 0
    prefetches: int = 0


@dataclass
class _Kept:
    packed: PackedAdapter
    pinned: bool = False
    removed: bool = False  # unloaded while in use: it goes when the last request ends


@dataclass
class AdapterStore:
    """The adapters of one pool, by any hashable key.

    Args:
        limit: most pages of adapters in the pool; None = any, shared with the cache as both need them.
    """

    pool: PagePool
    limit: int | None = None
    counts: StoreCounts = field(default_factory=StoreCounts)
    _kept: dict[Key, _Kept] = field(default_factory=dict)
    _resident: OrderedDict[Key, Resident] = field(default_factory=OrderedDict)  # used longest ago first
    _stream: torch.cuda.Stream | None = None

    def __contains__(self, key: Key) -> bool:
        return key in self._kept and not self._kept[key].removed

    def __iter__(self) -> Iterator[Key]:
        return iter([key for key in self._kept if key in self])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def add(self, key: Key, packed: PackedAdapter, pinned: bool = False) -> None:
        """Keep an adapter; ``pinned`` ones are put into the pool at once and stay there.

        Raises:
            InputError: the key is taken, the adapter is larger than the pool, or there is no room to pin it.
        """
        if key in self._kept:
            still = " and is still used by running requests" if self._kept[key].removed else ""
            raise InputError(f"'{key}' is loaded already{still}.")
        if packed.count > self.pool.total:
            raise InputError(
                f"'{key}' takes {packed.count} pages, more than the {self.pool.total} of the pool: give the server "
                "more memory for its pool."
            )
        if self.pool.pages.is_cuda:
            packed = PackedAdapter(packed.pages.pin_memory(), packed.places, packed.padding)
        self._kept[key] = _Kept(packed, pinned)
        if pinned and self._load(key) is None:
            del self._kept[key]
            raise InputError(f"There is no room to pin '{key}' ({packed.count} pages): give the pool more memory.")

    def remove(self, key: Key) -> None:
        """Forget an adapter; running requests that use it finish first.

        Raises:
            InputError: there is none.
        """
        if key not in self:
            raise InputError(f"'{key}' is not loaded.")
        self._kept[key].removed = True
        if key not in self._resident or not self._resident[key].users:
            self._drop(key)

    def pages(self, key: Key) -> int:
        """Pages that the adapter takes."""
        return self._kept[key].packed.count

    def users(self, key: Key) -> int:
        found = self._resident.get(key)
        return found.users if found else 0

    @property
    def resident(self) -> list[Key]:
        """In the pool, the one used longest ago first."""
        return list(self._resident)

    @property
    def pinned_pages(self) -> int:
        return sum(one.packed.count for one in self._kept.values() if one.pinned)

    def is_pinned(self, key: Key) -> bool:
        return self._kept[key].pinned

    def acquire(self, key: Key) -> Resident | None:
        """The adapter for a request that starts to run, put into the pool if need be; None if there is no room."""
        found = self._resident.get(key) or self._load(key)
        if found is not None:
            found.users += 1
            self._resident.move_to_end(key)
            _wait(found)
        return found

    def release(self, key: Key) -> None:
        """A request that acquired the adapter has ended."""
        found = self._resident[key]
        found.users -= 1
        if not found.users and self._kept[key].removed:
            self._drop(key)

    def prefetch(self, key: Key) -> bool:
        """Copy an adapter into pages that are free, in front of its request; whether it is in the pool now."""
        if key in self._resident:
            return True
        full = self.limit is not None and self.pool.stats().adapter + self.pages(key) > self.limit
        if key not in self or full or self.pages(key) > self.pool.free_pages:
            return False
        self.counts.prefetches += 1
        return self._load(key, ahead=True) is not None

    def make_room(self, count: int) -> bool:
        """Evict idle adapters until ``count`` pages are free; whether they are.

        Nothing is evicted if that would not be enough.
        """
        idle = [one for one in self._resident.values() if not one.users and not self._kept[one.key].pinned]
        if self.pool.free_pages + sum(one.packed.count for one in idle) < count:
            return False
        for one in idle:
            if self.pool.free_pages >= count:
                break
            self._evict(one.key)
            self.counts.evictions += 1
        return True

    def _load(self, key: Key, ahead: bool = False) -> Resident | None:
        packed = self._kept[key].packed
        over = 0 if self.limit is None else self.pool.stats().adapter + packed.count - self.limit
        if not self.make_room(max(packed.count, self.pool.free_pages + over)):
            return None
        ids = self.pool.alloc(packed.count, ("adapter", key), packed.padding)
        assert ids is not None
        made = self._resident[key] = Resident(key, packed, ids)
        self.counts.loads += 1
        made.copied = self._copy(packed.pages, torch.from_numpy(ids), ahead)
        return made

    def _copy(self, pages: Tensor, ids: Tensor, ahead: bool) -> torch.cuda.Event | None:
        """Write the pages; ``ahead`` of their use on a stream of its own, beside the running step (CUDA)."""
        target = self.pool.pages
        if not target.is_cuda:
            target.index_copy_(0, ids, pages)
            return None
        own = torch.cuda.current_stream(target.device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(target.device)
        stream = self._stream if ahead else own
        stream.wait_stream(own)  # earlier steps may still read what was in these pages
        with torch.cuda.stream(stream):
            target.index_copy_(0, ids.to(target.device, non_blocking=True), pages.to(target.device, non_blocking=True))
            done = torch.cuda.Event()
            done.record(stream)
        return done

    def _evict(self, key: Key) -> None:
        _wait(self._resident.pop(key))
        self.pool.free(("adapter", key))

    def _drop(self, key: Key) -> None:
        if key in self._resident:
            self._evict(key)
        del self._kept[key]


def _wait(resident: Resident) -> None:
    """Later work on the current stream comes after the copy."""
    if resident.copied is not None:
        torch.cuda.current_stream().wait_event(resident.copied)
        resident.copied = None
