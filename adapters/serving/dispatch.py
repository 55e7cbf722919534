"""Adds each token's own adapter to the outputs of the model's modules.

Forward hooks on the modules that adapters change; the modules themselves stay. A :class:`BatchPlan` says which token
belongs to which adapter. It is made once per step (and kept while the batch stays the same), and shared by all layers.
Tokens are sorted into one segment per adapter; adapters whose ranks agree in every module are computed together, so no
rank is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapters.serving.kernels import Kernel, kernel
from adapters.serving.packing import Place, pages_of
from adapters.serving.pool import PagePool
from adapters.serving.store import Resident


@dataclass(frozen=True, eq=False)
class Group:
    """n adapters of the same rank r in one module, with their tokens: S in all, sorted by adapter.

    Attributes:
        rank, inputs, outputs: r, in, out.
        tokens: (S,) rows of the batch, adapter by adapter.
        slot: (S,) number of the adapter of each row among these n.
        lengths: tokens per adapter, n of them.
        A, B: (n, r * p(in)) and (n, r * p(out)) pages.
        d: (n, p(out)) pages of DoRA's row; None if these have none.
    """

    rank: int
    inputs: int
    outputs: int
    tokens: Tensor
    slot: Tensor
    lengths: tuple[int, ...]
    A: Tensor
    B: Tensor
    d: Tensor | None


class BatchPlan:
    """Which token of a batch has which adapter.

    Args:
        tokens: the adapter of each of T tokens, None for the base alone.
        keep: rows of the batch that reach the output layer; None = all.
    """

    def __init__(self, tokens: Sequence[Resident | None], pool: PagePool, keep: Sequence[int] | None = None) -> None:
        self.pool = pool
        self.adapters = [one for one in dict.fromkeys(tokens) if one is not None]
        numbers = {id(one): number for number, one in enumerate(self.adapters)}
        self._slots = np.array([-1 if one is None else numbers[id(one)] for one in tokens])
        self.head = None if keep is None else BatchPlan([tokens[row] for row in keep], pool)
        self._shelves = list(self._sorted())
        self._groups: dict[str, list[Group]] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def sized(self, rows: int) -> BatchPlan:
        """The plan for a module that sees so many rows: experts see a token as often as they are chosen for it.

        Raises:
            ValueError: the rows are not those of the batch, and their tokens have different adapters.
        """
        if rows == len(self):
            return self
        if len(self.adapters) != 1 or (self._slots < 0).any():
            raise ValueError(f"A module sees {rows} rows of a batch of {len(self)} tokens with different adapters.")
        return BatchPlan(self.adapters * rows, self.pool)

    def groups(self, module: str) -> list[Group]:
        """The work to do in one module; empty if no token's adapter changes it."""
        if module not in self._groups:
            self._groups[module] = list(self._grouped(module))
        return self._groups[module]

    def _sorted(self) -> Iterator[_Shelf]:
        """The adapters whose rows lie in the same places, together: their ranks agree in every module."""
        device = self.pool.pages.device
        alike: dict[Any, list[int]] = {}
        for number, one in enumerate(self.adapters):
            alike.setdefault(one.packed.layout, []).append(number)
        for chosen in alike.values():
            rows = [np.flatnonzero(self._slots == number) for number in chosen]
            ids = np.stack([self.adapters[number].ids for number in chosen])
            slot = np.repeat(np.arange(len(chosen)), [len(one) for one in rows])
            yield _Shelf(
                self.adapters[chosen[0]].packed.places, torch.from_numpy(ids).to(device),
                torch.from_numpy(np.concatenate(rows)).to(device), torch.from_numpy(slot).to(device),
                tuple(map(len, rows)),
            )  # fmt: skip

    def _grouped(self, module: str) -> Iterator[Group]:
        page = self.pool.page_elems
        for shelf in self._shelves:
            place = shelf.places.get(module)
            if place is None:
                continue
            rank, wide, high = place.rank, pages_of(place.inputs, page), pages_of(place.outputs, page)
            A, B, d = shelf.ids[:, place.start :].split_with_sizes(
                [rank * wide, rank * high, shelf.ids.shape[1] - place.start - rank * (wide + high)], 1
            )
            yield Group(rank, place.inputs, place.outputs, shelf.tokens, shelf.slot, shelf.lengths, A.contiguous(),
                        B.contiguous(), d[:, :high].contiguous() if place.dora else None)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Shelf:
    """Adapters of one layout: their pages (n, count), and their tokens as in :class:`Group`."""

    places: Mapping[str, Place]
    ids: Tensor
    tokens: Tensor
    slot: Tensor
    lengths: tuple[int, ...]


class LoraDispatch:
    """The hooks of one model.

    Args:
        backend: how the products are computed, see :mod:`adapters.serving.kernels`.
        head: path of the output layer, which sees the kept rows only; "" if it sees all of them.
    """

    def __init__(self, model: nn.Module, pool: PagePool, backend: str = "auto", head: str = "") -> None:
        self.model, self.pool, self.head = model, pool, head
        self.compute: Kernel = kernel(backend, pool.pages.device)
        self._plan: BatchPlan | None = None
        self._hooks: dict[str, RemovableHandle] = {}

    def watch(self, modules: Iterable[str]) -> None:
        """Put hooks on these modules, where there are none yet."""
        for name in modules:
            if name not in self._hooks:
                module = self.model.get_submodule(name)
                self._hooks[name] = module.register_forward_hook(self._hook(name))

    def close(self) -> None:
        """Take all hooks off: the model is itself again."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks = {}

    @contextmanager
    def planned(self, plan: BatchPlan) -> Iterator[None]:
        """Inside, forward passes of the model follow ``plan``."""
        before, self._plan = self._plan, plan
        try:
            yield
        finally:
            self._plan = before

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def act(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            plan = self._plan
            if plan is not None and name == self.head and plan.head is not None:
                plan = plan.head
            if plan is None or not plan.adapters:
                return None
            plan = plan.sized(output.numel() // output.shape[-1])
            groups = plan.groups(name)
            return self._added(module, args[0], output, groups) if groups else None

        return act

    @torch.no_grad()
    def _added(self, module: nn.Module, x: Tensor, output: Tensor, groups: Sequence[Group]) -> Tensor:
        y = output.reshape(-1, output.shape[-1])
        table = isinstance(module, nn.Embedding)
        flat = x.reshape(-1) if table else x.reshape(-1, x.shape[-1])
        for group in groups:
            if group.d is not None:
                _scale_rows(y, group, self.pool, None if table else getattr(module, "bias", None))
            if table:
                _add_embeddings(flat, y, group, self.pool, getattr(module, "embed_scale", None))
            else:
                self.compute(flat, y, group, self.pool)
        return y.view_as(output)


def _scale_rows(y: Tensor, group: Group, pool: PagePool, bias: Tensor | None) -> None:
    """DoRA: y_t += d * (W0 x_t), before the update is added."""
    assert group.d is not None
    d = pool.pages[group.d].flatten(1)[:, : group.outputs][group.slot].to(y)
    rows = y[group.tokens]
    y[group.tokens] = rows + d * (rows if bias is None else rows - bias)


def _add_embeddings(ids: Tensor, y: Tensor, group: Group, pool: PagePool, scale: Any) -> None:
    """A table's update: token v takes column v of A, which is number v % P of page v // P of each row."""
    n, page = len(group.lengths), pool.page_elems
    v = ids[group.tokens]
    at = group.A.view(n, group.rank, -1)[group.slot, :, v // page]  # (S, r)
    h = pool.pages[at, (v % page)[:, None]]
    B = pool.pages[group.B].view(n, group.rank, -1)[:, :, : group.outputs]
    update = torch.einsum("sr,sro->so", h, B[group.slot]).to(y)
    y.index_add_(0, group.tokens, update if scale is None else update * scale)
