"""One base under several adapters in one forward pass: the rows of all adapters are one batch.

    y = [base(x)[rows_1] + update_1(x[rows_1]); base(x)[rows_2] + update_2(x[rows_2]); ...]

The base's product is computed once for all rows; every adapter's own layer, unchanged, is called with its own rows at
their own length and finds there the base's result for them. So adapters of any rank, scale and kind share a batch, and
gradients are block-diagonal: they equal those of separate passes (m-LoRA, arXiv 2312.02515).

Where all of them are plain LoRAs of low rank, their updates are one: the A below each other, the B beside
each other, and between them gates that keep every row to the ranks of its own adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from adapters.errors import InputError

M = TypeVar("M", bound=nn.Module)

SMALL = 1 / 4
"""Updates are one pair of products while their matrices hold at most this share of the base's numbers: then the calls
saved weigh more than the products with gates of zero (measured on a CPU)."""


@dataclass(frozen=True)
class Segment:
    """The rows of one adapter in a batch.

    Attributes:
        rows: which of the batch's rows.
        width: their length; the batch may be longer, and what is behind is padding.
        layers: module path in the base -> the adapter's own layer.
        random: a context for its layers, in which they draw the adapter's own random numbers.
    """

    rows: slice
    width: int
    layers: Mapping[str, nn.Module]
    random: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Layout:
    """How the current batch is divided; one object for all layers of a base.

    Attributes:
        width: length of the batch's rows.
    """

    segments: Sequence[Segment] = ()
    width: int = 0
    _gates: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.segments[-1].rows.stop

    @contextmanager
    def of(self, segments: Sequence[Segment], width: int) -> Iterator[None]:
        """Inside, batches are divided like this: for the forward pass and, with checkpointing, for the backward."""
        self.segments, self.width = segments, width
        try:
            yield
        finally:
            self.segments, self.width, self._gates = (), 0, {}

    def gates(self, pairs: Sequence[_Pair], like: Tensor) -> Tensor:
        """(rows, all ranks): a row's gates are the scale of its own adapter, and 0 at the ranks of the others."""
        key = (*((pair.rank, pair.scale) for pair in pairs), like.dtype, like.device)
        if key not in self._gates:
            made, first = like.new_zeros(self.rows, sum(pair.rank for pair in pairs)), 0
            for segment, pair in zip(self.segments, pairs, strict=True):
                made[segment.rows, first : first + pair.rank] = pair.scale
                first += pair.rank
            self._gates[key] = made
        return self._gates[key]


@dataclass(frozen=True)
class _Pair:
    """The update s B A x of a plain LoRA; without A and B, none."""

    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 0.0

    @property
    def rank(self) -> int:
        return 0 if self.A is None else self.A.shape[0]

    @classmethod
    def of(cls, layer: nn.Module | None) -> _Pair | None:
        """That of a segment's layer; None if it is not a plain LoRA."""
        if layer is None:
            return cls()
        weights: Any = layer
        if type(layer) is not Linear or layer.lora_variant or layer.merged or len(layer.active_adapters) != 1:
            return None
        name = layer.active_adapters[0]
        if not isinstance(layer.lora_dropout[name], nn.Identity) or layer.lora_B[name].bias is not None:
            return None
        return cls(weights.lora_A[name].weight, weights.lora_B[name].weight, weights.scaling[name])


@dataclass
class _Input:
    """A layer's input (rows, ...), as the layout divides it.

    Attributes:
        long: its second dimension is the position in the row.
        merged: rows and positions were one dimension.
    """

    x: Tensor
    long: bool
    merged: bool = False

    def piece(self, segment: Segment, of: Tensor) -> Tensor:
        """The segment's part of a tensor that is divided like this."""
        found = of[segment.rows, : segment.width] if self.long else of[segment.rows]
        return found.flatten(0, 1) if self.merged else found


class PackedLayer(nn.Module):
    """A layer of the base with, for every segment, its adapter's own layer at the same place.

    Args:
        base: the layer without adapters.
        name: its path in the base.
    """

    def __init__(self, base: nn.Module, name: str, layout: Layout) -> None:
        super().__init__()
        self.base, self.name, self.layout = base, name, layout
        self._pairs: dict[int, _Pair | None] = {}

    def forward(self, x: Tensor) -> Tensor:
        layout, given = self.layout, self._divided(x)

        @cache
        def result() -> Tensor:
            found: Tensor = self.base(x)
            return found.unflatten(0, (layout.rows, layout.width)) if given.merged else found

        packed = self._at_once(given, result)
        if packed is None:
            packed = torch.cat([self._part(segment, given, result) for segment in layout.segments])
        return packed.flatten(0, 1) if given.merged else packed

    def _at_once(self, given: _Input, result: Callable[[], Tensor]) -> Tensor | None:
        """The output for all rows by one pair of products; None where that is not possible or not worth it."""
        pairs = [pair for segment in self.layout.segments if (pair := self._pair(segment)) is not None]
        if len(pairs) < len(self.layout.segments):
            return None
        downs = [pair.A for pair in pairs if pair.A is not None]
        ups = [pair.B for pair in pairs if pair.B is not None]
        numbers = sum(matrix.numel() for matrix in (*downs, *ups))
        if not downs or numbers > SMALL * downs[0].shape[1] * ups[0].shape[0]:
            return None
        y, down = result(), torch.cat(downs)
        gates = self.layout.gates(pairs, down.detach())
        hidden = F.linear(given.x.to(down.dtype), down) * (gates[:, None] if given.x.dim() == 3 else gates)
        return y + F.linear(hidden, torch.cat(ups, dim=1)).to(y.dtype)

    def _pair(self, segment: Segment) -> _Pair | None:
        own = segment.layers.get(self.name)
        if id(own) not in self._pairs:
            self._pairs[id(own)] = _Pair.of(own)
        return self._pairs[id(own)]

    def _part(self, segment: Segment, given: _Input, result: Callable[[], Tensor]) -> Tensor:
        """The output of one segment's rows (rows, ...), padded like the batch."""
        own = segment.layers.get(self.name)
        if own is None:
            return result()[segment.rows]
        piece = given.piece(segment, given.x)
        with _base_gives(own, piece, lambda: given.piece(segment, result())), segment.random():
            found: Tensor = own(piece)
        if given.merged:
            found = found.unflatten(0, (-1, segment.width))
        missing = self.layout.width - segment.width if given.long else 0
        return F.pad(found, (*[0, 0] * (found.dim() - 2), 0, missing)) if missing else found

    def _divided(self, x: Tensor) -> _Input:
        layout, features = self.layout, 0 if isinstance(self.base, nn.Embedding) else 1
        if x.shape[0] == layout.rows:
            return _Input(x, x.dim() >= 2 + features and x.shape[1] == layout.width)
        if x.shape[0] == layout.rows * layout.width and x.dim() == 1 + features:
            return _Input(x.unflatten(0, (layout.rows, layout.width)), long=True, merged=True)
        raise InputError(
            f"The layer '{self.name}' of this base mixes the rows of a batch (its input is {tuple(x.shape)}), so its "
            "adapters are trained one by one: start them as separate jobs."
        )


@contextmanager
def _base_gives(own: nn.Module, x: Tensor, result: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, the base below the layer ``own`` answers ``x`` with ``result()`` instead of computing it."""
    base: Any = getattr(own, "base_layer", None)
    if base is None:
        yield
        return
    before, compute = base.__dict__.get("forward"), base.forward
    base.forward = lambda given, *args, **more: result() if given is x else compute(given, *args, **more)
    try:
        yield
    finally:
        if before is None:
            del base.forward
        else:
            base.forward = before


def own_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> layer, for the modules of ``model`` that belong to its adapter: PEFT's layers and modules it retrains."""
    found: dict[str, Any] = {}
    inside = ""
    for name, module in model.named_modules():  # a module comes directly before those inside it
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            found[name], inside = module, f"{name}."
    return found


def pack(model: nn.Module, names: Iterable[str], layout: Layout) -> None:
    """Replace the layers ``names`` of a base without adapters by packed ones; one may be inside another.

    Raises:
        InputError: it has no such layer.
    """
    for name in sorted(names, key=lambda name: -name.count(".")):
        parent, _, last = name.rpartition(".")
        try:
            place, layer = model.get_submodule(parent), model.get_submodule(name)
        except AttributeError:
            raise InputError(f"The base has no layer '{name}', which an adapter changes: train it alone.") from None
        setattr(place, last, PackedLayer(layer, name, layout))


def draws(layer: nn.Module) -> bool:
    """Whether an adapter's layer may draw random numbers: it has dropout, or parts of its own (noise)."""
    dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in layer.modules())
    return dropout or bool(getattr(layer, "lora_variant", {}))


def twin(model: M) -> M:
    """A second model with modules of its own and the same parameters and buffers, to get another adapter."""
    kept: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


def tie(model: nn.Module, first: nn.Module) -> None:
    """Let ``model`` use the parameters of ``first`` where both have them.

    Raises:
        InputError: they differ.
    """
    theirs = dict(first.named_parameters(remove_duplicate=False))
    for name, own in list(model.named_parameters(remove_duplicate=False)):
        if (other := theirs.get(name)) is None:
            continue
        if own.shape != other.shape or own.dtype != other.dtype or not torch.equal(own, other):
            raise InputError(f"The bases differ in '{name}': only adapters of one base are trained together.")
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, other)
