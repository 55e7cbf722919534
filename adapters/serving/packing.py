"""An adapter as rows of pages, ready to be copied into the pool.

Of each module, in this order, with p(n) = ceil(n / P) pages for a row of n numbers:

    A  (r, in)    r rows of p(in) pages
    B  (r, out)   r rows of p(out) pages; the scale is in it, once
    d  (out,)     one row of p(out) pages, only for DoRA: y = W0 x + d * (W0 x) + B^T A x

Several adapters at fixed strengths are one adapter here, of the sum of their ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from adapters.errors import FamilyError, InputError
from adapters.formats.lora import LoraLayer
from adapters.layers.gated import Adapter, summed
from adapters.layers.sizes import sizes


@dataclass(frozen=True)
class Place:
    """Where the rows of one module are among an adapter's pages.

    Attributes:
        start: its first page.
        rank, inputs, outputs: r, in, out.
        dora: whether there is a row d.
    """

    start: int
    rank: int
    inputs: int
    outputs: int
    dora: bool


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter in host memory.

    Attributes:
        pages: (count, P).
        places: module path -> where its rows are.
        padding: numbers in the pages that hold nothing.
    """

    pages: Tensor
    places: Mapping[str, Place]
    padding: int

    @property
    def count(self) -> int:
        """Number of pages."""
        return int(self.pages.shape[0])

    @cached_property
    def layout(self) -> str:
        """Equal for adapters with the same ranks in the same modules; text, because it keeps its hash."""
        return repr(tuple(self.places.items()))

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(place.rank for place in self.places.values())


def pages_of(numbers: int, page: int) -> int:
    """p(n): pages of ``page`` numbers that a row of ``numbers`` takes."""
    return -(-numbers // page)


def pack(
    adapters: Sequence[tuple[Mapping[str, LoraLayer], float]],
    model: nn.Module,
    page: int,
    dtype: torch.dtype = torch.float32,
    max_rank: int | None = None,
    name: str = "the adapter",
) -> PackedAdapter:
    """The sum of adapters at fixed strengths, packed.

    Args:
        adapters: (module path -> layer fitted to ``model``, strength) each.
        page: P.
        max_rank: largest rank of a module; None = any.
        name: for messages.

    Raises:
        InputError: a rank above ``max_rank``, a value that is not finite in ``dtype``, or a module that is no linear
            layer and no embedding table.
        FamilyError: a module that the model lacks.
    """
    parts = [Adapter(layers, strength=strength) for layers, strength in adapters]
    rows: list[Tensor] = []
    places: dict[str, Place] = {}
    start = padding = 0
    for path in sorted({path for one in parts for path in one.layers}):
        module = _module(model, path, name)
        outputs, inputs = sizes(module)
        A, B, d = summed(path, module, parts, torch.device("cpu"), dtype)
        if A.ndim != 2:
            raise InputError(f"'{name}' adapts '{path}', a {type(module).__name__}: only linear layers and embeddings "
                             "can be served.")  # fmt: skip
        rank = int(A.shape[0])
        if max_rank is not None and rank > max_rank:
            raise InputError(f"'{name}' has rank {rank} in '{path}', above the largest that is served, {max_rank}: "
                             "start the server with a larger --max-rank.")  # fmt: skip
        if (A.shape[1], B.shape[1]) != (inputs, outputs):
            raise FamilyError(f"'{name}' is for a matrix ({B.shape[1]}, {A.shape[1]}) in '{path}', but this base has "
                              f"({outputs}, {inputs}) there.")  # fmt: skip
        places[path] = Place(start, rank, inputs, outputs, d is not None)
        matrices = [A, B] if d is None else [A, B, d[None]]
        for matrix in matrices:
            made = _paged(matrix, page)
            if not bool(torch.isfinite(made).all()):
                raise InputError(f"'{name}' holds values in '{path}' that are not finite in {dtype}.")
            rows.append(made)
            start += made.shape[0]
            padding += made.numel() - matrix.numel()
    if not rows:
        raise InputError(f"'{name}' holds no layers.")
    return PackedAdapter(torch.cat(rows), places, padding)


def _paged(matrix: Tensor, page: int) -> Tensor:
    """(rows, n) -> (rows * p(n), P), each row filled up with zeros."""
    each = pages_of(matrix.shape[1], page)
    filled = matrix.new_zeros(matrix.shape[0], each * page)
    filled[:, : matrix.shape[1]] = matrix
    return filled.view(-1, page)


def _module(model: nn.Module, path: str, name: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise FamilyError(f"'{name}' adapts '{path}', which this base lacks: it is for another base.") from None
