"""Unified paging: one tensor of pages, shared by the key-value cache and the adapters (arXiv 2311.03285, section 5.1).

A page holds P numbers. P is one token's keys (or values) of one layer, kv_heads * head_dim: a token of a model with L
layers takes 2 L pages, and a row of n numbers of an adapter takes ceil(n / P). Pages need not be adjacent. Page 0 is
all zeros and never given away: shorter caches are filled up with it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Owner = tuple[str, Hashable]
"""What the pages are for ("kv", "adapter"), and for whom."""

ZERO = 0
"""The page of zeros."""


@dataclass(frozen=True)
class PoolStats:
    """How the pages are used.

    Attributes:
        total: pages that can be given away.
        free, kv, adapter: their use now; they add up to ``total``.
        peak: most pages that were in use at once.
        padding: numbers in adapter pages that hold nothing, because a row ends within its last page.
    """

    total: int
    free: int
    kv: int
    adapter: int
    peak: int
    padding: int


class PagePool:
    """Args:
    num_pages: including the page of zeros.
    page_elems: P.

    Raises:
        ValueError: no page to give away.
    """

    def __init__(
        self, num_pages: int, page_elems: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        if num_pages < 2 or page_elems < 1:
            raise ValueError(f"A pool needs 2 pages of 1 number at least, got {num_pages} of {page_elems}.")
        self.pages = torch.zeros(num_pages, page_elems, dtype=dtype, device=device)
        self.page_elems = page_elems
        self._stack = np.arange(num_pages - 1, 0, -1)  # free ids, the next one last
        self._free = num_pages - 1
        self._owners: dict[Owner, list[Ids]] = {}
        self._used = {"kv": 0, "adapter": 0}
        self._padding: dict[Owner, int] = {}
        self._peak = 0

    @property
    def total(self) -> int:
        return len(self._stack)

    @property
    def free_pages(self) -> int:
        return self._free

    def alloc(self, count: int, owner: Owner, padding: int = 0) -> Ids | None:
        """``count`` pages for ``owner``, added to those it has; None if so many are not free.

        Args:
            padding: numbers of them that will hold nothing.
        """
        if count > self._free:
            return None
        ids = self._stack[self._free - count : self._free][::-1].copy()
        self._free -= count
        self._used[owner[0]] += count
        self._owners.setdefault(owner, []).append(ids)
        if padding:
            self._padding[owner] = self._padding.get(owner, 0) + padding
        self._peak = max(self._peak, self.total - self._free)
        return ids

    def free(self, owner: Owner) -> int:
        """Take back every page of ``owner``; returns their number (0 if it has none)."""
        returned = 0
        for ids in self._owners.pop(owner, []):
            self._stack[self._free : self._free + len(ids)] = ids[::-1]
            self._free += len(ids)
            returned += len(ids)
        self._used[owner[0]] -= returned
        self._padding.pop(owner, None)
        return returned

    def held(self, owner: Owner) -> int:
        """Number of pages of ``owner``."""
        return sum(len(ids) for ids in self._owners.get(owner, []))

    def stats(self) -> PoolStats:
        return PoolStats(
            self.total, self._free, self._used["kv"], self._used["adapter"], self._peak, sum(self._padding.values())
        )

    def check(self) -> None:
        """Raise :class:`AssertionError` unless each page is free or owned once, and the page of zeros is zero."""
        owned = [ids for parts in self._owners.values() for ids in parts]
        every = np.concatenate([self._stack[: self._free], *owned])
        assert len(every) == self.total, f"{len(every)} pages are known, of {self.total}"
        assert len(np.unique(every)) == self.total, "a page is owned twice"
        assert every.min() > ZERO, "the page of zeros was given away"
        assert sum(self._used.values()) == sum(map(len, owned)), "the counts of used pages are wrong"
        assert not bool(self.pages[ZERO].any()), "the page of zeros was written to"
