"""Many LoRAs on one model as one gated low-rank product per module.

With W0 (out, in) frozen and adapters i = 1..N of rank r_i and scale s_i, R = sum r_i,

    y = W0 x + sum_i g_i s_i B_i A_i x  =  W0 x + B_cat (G * (A_cat x))

    A_cat (R, in)   the A_i stacked
    B_cat (out, R)  the s_i B_i side by side (scales are folded in *before* joining: averaging A and B apart is wrong)
    G     (1 | batch, R)  the gate g_i of the adapter that owns the column

so N adapters cost two products instead of 2 N. For a convolution A_cat is one convolution with R outputs and B_cat a
1 x 1 convolution. For an embedding table the tokens select rows of A_cat^T. This is exact, not an approximation; a gate
is any number, per adapter and sample.

If the batch is *grouped* (adapter-major: sample block i belongs to adapter i alone, as in Composite), the off-diagonal
blocks of the product are never computed: A (N, in, r) and B (N, r, out), ranks padded with zeros, multiply the
(N, batch * length, in) view of x in one batched product.

DoRA (arXiv 2402.09353), m / |W0 + sBA| (W0 + sBA) x, is for a fixed strength also linear in x:
    y = W0 x + sum_i g_i [ d_i * (W0 x) + (1 + d_i) * s_i B_i A_i x ],   d_i = m_i / |W0 + s_i B_i A_i| - 1
with d_i (out,) computed once. Its gate can only be 0 or 1, because the norm would change with the strength.

The modules of the model are never replaced: a forward hook adds to their output, and removing the hooks leaves the
model exactly as it was. So the base's own product may be one with quantised weights; only DoRA's d_i reads a weight,
once. Changing gates writes a few numbers and visits no module. Gates that stay the same for several
calls can be folded into the weights instead (:mod:`adapters.layers.folded`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from adapters.compression.storage import plain_weight
from adapters.errors import InputError
from adapters.formats.lora import LoraLayer
from adapters.layers import folded
from adapters.layers.folded import Blocks

Pair = tuple[Tensor, Tensor]
"""A (r, in[, kh, kw]) and B (r, out), the scale folded into B."""

TokenGates = Callable[[str, int], Tensor | None]
"""(module path, number of tokens or pixels L; 0 = the input has no positions) -> strength per position and adapter
(L, N), or (1, N) without positions, or None = 1 everywhere. It must return the same tensor until something changes."""


@dataclass(frozen=True)
class Adapter:
    """One adapter of :class:`GatedAdapters`.

    Attributes:
        layers: module path -> layer, fitted to the model.
        factors: module path -> constant factor (per-block weights); 1 where absent.
        strength: constant strength folded into the matrices, for adapters with DoRA layers (which are normalised at
            it); for others it stays 1, and the gate sets their strength.
    """

    layers: Mapping[str, LoraLayer]
    factors: Mapping[str, float] = field(default_factory=dict)
    strength: float = 1.0


class Gates:
    """Which adapters act on which sample, and how strongly; shared by all layers.

    ``mode`` is "off" (base model), "joint" (all samples share one row of ``strengths``, or each has its own; adapters
    ``first`` to ``last`` are computed) or "grouped" (the batch is ``blocks`` equal parts, one per adapter of
    ``selection``).
    """

    def __init__(self, count: int, device: torch.device, dtype: torch.dtype, narrow: bool = True) -> None:
        self.count = count
        self.mode: Literal["off", "joint", "grouped"] = "off"
        self.first, self.last = 0, count
        self.blocks = 1
        self.selection: slice | Tensor = slice(0, count)
        self.plain = False  # all strengths in use are 1: nothing to multiply
        self.narrow = narrow  # compute only the columns in use; False keeps all shapes fixed (CUDA graphs)
        self.version = 0  # counts changes; layers cache what they derive from one version
        self._setting: tuple[object, ...] = ("off",)
        self.strengths = torch.zeros(1, count, device=device, dtype=dtype)
        self.token_gates: TokenGates | None = None
        self.in_front: Callable[[str], bool] = lambda name: False
        self.changed: Callable[[Blocks | None], None] = lambda blocks: None  # called with the gates of each block
        self._owners: dict[tuple[int, ...], Tensor] = {}
        self._columns: dict[tuple[int, ...], Tensor] = {}
        self._token_columns: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def off(self) -> None:
        """Use the base model only."""
        self.mode, self._setting = "off", ("off",)
        self.changed(None)

    def joint(self, strengths: Sequence[float]) -> None:
        """The same strengths, one per adapter, for every sample; leading and trailing zeros are not computed."""
        if self._is_set(("joint", *strengths)):
            return
        used = [i for i, strength in enumerate(strengths) if strength != 0]
        if not used and self.narrow:
            self.mode = "off"
            self.changed(None)
            return
        self.first, self.last = (used[0], used[-1] + 1) if self.narrow else (0, self.count)
        self.plain = self.narrow and all(strength == 1 for strength in strengths[self.first : self.last])
        self.mode = "joint"
        self._write(torch.tensor([list(strengths)], dtype=torch.float32))
        self.changed((tuple(strengths),))

    def per_sample(self, strengths: Tensor) -> None:
        """Separate strengths for every sample: (batch, N)."""
        self.first, self.last, self.plain, self.mode = 0, self.count, False, "joint"
        self._setting = ("per sample",)
        self._write(strengths)
        self.changed(None)

    def grouped(self, adapters: Sequence[int], strengths: Sequence[float]) -> None:
        """An adapter-major batch of equal blocks: block k uses only adapter ``adapters[k]``, at ``strengths[k]``."""
        if self._is_set(("grouped", *adapters, *strengths)):
            return
        self.mode, self.blocks = "grouped", len(adapters)
        first = adapters[0]
        run = list(adapters) == list(range(first, first + len(adapters)))
        self.selection = slice(first, first + len(adapters)) if run else torch.tensor(list(adapters))
        self.plain = all(strength == 1 for strength in strengths)
        values = [0.0] * self.count
        for adapter, strength in zip(adapters, strengths, strict=True):
            values[adapter] = strength
        self._write(torch.tensor([values], dtype=torch.float32))
        self.changed(alone(adapters, strengths, self.count))

    def add_layout(self, ranks: tuple[int, ...]) -> None:
        """Prepare G for modules whose adapters have these ranks."""
        if ranks not in self._owners:
            owners = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
            self._owners[ranks] = owners.to(self.strengths.device)
            self._columns[ranks] = self.strengths[:, self._owners[ranks]]

    def columns(self, ranks: tuple[int, ...]) -> Tensor:
        """G (1 | batch, R) for modules whose adapters have these ranks; one tensor for all of them."""
        return self._columns[ranks]

    def owners(self, ranks: tuple[int, ...]) -> Tensor:
        """The adapter that owns each column (R,)."""
        return self._owners[ranks]

    def tokens_to(self, token_gates: TokenGates | None, in_front: Callable[[str], bool] = lambda name: False) -> None:
        """Make strengths depend on the position; None = no longer.

        Args:
            in_front: whether the input of the module of this name has the positions in front and the batch second.
        """
        self.token_gates, self.in_front = token_gates, in_front
        self._token_columns.clear()
        if token_gates is not None:
            self.changed(None)

    def token_columns(self, name: str, tokens: int, ranks: tuple[int, ...], lo: int, hi: int, like: Tensor) -> Any:
        """Strength per position of the columns lo..hi, (1, L | 1, hi - lo), or None; cached while the gates stay."""
        mask = self.token_gates(name, tokens) if self.token_gates else None
        if mask is None:
            return None
        key = (id(mask), ranks, lo, hi, like.dtype, like.device)
        kept = self._token_columns.get(key)
        if kept is None or kept[0] is not mask:
            columns = mask.to(like)[None, :, self._owners[ranks][lo:hi].to(like.device)]
            kept = self._token_columns[key] = mask, columns
        return kept[1]

    def _is_set(self, setting: tuple[object, ...]) -> bool:
        """Whether the gates already have this setting, which is stored otherwise."""
        same, self._setting = setting == self._setting, setting
        return same

    def _write(self, strengths: Tensor) -> None:
        self.version += 1
        if strengths.shape == self.strengths.shape:  # in place: a captured graph reads the same memory
            self.strengths.copy_(strengths)
            for ranks, columns in self._columns.items():
                torch.index_select(self.strengths, 1, self._owners[ranks], out=columns)
        else:
            self.strengths = strengths.to(self.strengths).clone()
            self._columns = {ranks: self.strengths[:, owners] for ranks, owners in self._owners.items()}


def alone(adapters: Sequence[int], strengths: Sequence[float], count: int) -> Blocks:
    """A block for each of ``adapters``, in which only that one of ``count`` adapters acts."""
    return tuple(
        tuple(strength if i == adapter else 0.0 for i in range(count))
        for adapter, strength in zip(adapters, strengths, strict=True)
    )


class GatedLayer:
    """The adapters of one module.

    Joint tensors: A (R, in[, kh, kw]), B (R, out). Grouped: A (N, in, r) and B (N, r, out) for Linear, and
    A (N, r, in, kh, kw), B (N, out, r, 1, 1) for Conv2d. ``rows`` (N, out) holds DoRA's d_i, or is None.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        layers: Sequence[LoraLayer | None],
        adapters: Sequence[Adapter],
        gates: Gates,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.name = name
        self.gates = gates
        self.ranks = tuple(layer.rank if layer else 0 for layer in layers)
        gates.add_layout(self.ranks)
        self.offsets = tuple(sum(self.ranks[:i]) for i in range(len(self.ranks) + 1))
        self.module = module
        self.is_conv = isinstance(module, nn.Conv2d)
        self.is_table = isinstance(module, nn.Embedding)
        pairs, self.rows = _pairs(name, module, layers, adapters, device, dtype)
        self.A, self.B = _joined(pairs)
        self._grouped: Pair | None = None
        self._folded: Pair | None = None
        self._version = -1

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook: ``output`` plus the adapters' update (in place where that is safe)."""
        gates = self.gates
        if gates.mode == "off":
            return None
        joint = gates.mode == "joint"
        lo, hi = (self.offsets[gates.first], self.offsets[gates.last]) if joint else (0, self.offsets[-1])
        if lo == hi and self.rows is None:
            return None
        if not args:
            raise InputError(
                f"The module '{self.name}' is called with keyword arguments only, so its adapter gets no input."
            )
        x = args[0]
        base = output
        rows = self._row_scale(output) if self.rows is not None else None
        if rows is not None:
            own = getattr(self.module, "bias", None)  # a table has none
            bias = _channels(own, output, self.is_conv) if own is not None else 0
            output = output + rows * (base - bias)
        if lo == hi:
            return output
        if self.is_table:
            return self._table(x, output, lo, hi)
        if gates.mode == "grouped":
            return self._conv_groups(x, output) if self.is_conv else self._linear_groups(x, output)
        return self._conv(x, output, lo, hi) if self.is_conv else self._linear(x, output, lo, hi)

    def inside(self, blocks: Blocks, x: Tensor) -> folded.Forward:
        """A forward function with the adapters folded into the weight or, if that is not worth it, beside it.

        Args:
            blocks: strength of every adapter in each block of the batch, as set in the gates.
            x: an input, for its size.
        """
        module: Any = self.module
        weights: list[Tensor] = []
        if folded.worth(len(blocks), x, module.weight):
            weights = self._weights(blocks, module.weight.to(self.A.device))
        if weights:
            return folded.forward(module, weights)
        plain = type(module).forward

        def beside(x: Tensor) -> Tensor:
            output: Tensor = plain(module, x)
            added = self(module, (x,), output)
            return output if added is None else added

        return beside

    def _weights(self, blocks: Blocks, own: Tensor) -> list[Tensor]:
        """W' of every block, or one for all if no adapter acts; empty if 16 bits are too coarse."""
        weights = []
        for strengths in blocks:
            used = [i for i, strength in enumerate(strengths) if strength != 0 and self.ranks[i]]
            if not used:
                weights.append(own)
                continue
            lo, hi = self.offsets[used[0]], self.offsets[used[-1] + 1]
            gates = torch.tensor(strengths, device=own.device)
            rows = None if self.rows is None else gates.to(self.rows) @ self.rows
            summed = folded.total(own, self.A[lo:hi], self.B[lo:hi], gates[self.gates.owners(self.ranks)[lo:hi]], rows)
            if summed is None:
                return []
            weights.append(summed)
        return weights[:1] if all(weight is own for weight in weights) else weights

    def nbytes(self) -> int:
        """Memory of the tensors in use."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage() for t in (self.A, self.B, *(self._grouped or ()))
        }
        return sum(storage.nbytes() for storage in storages.values())

    def _linear(self, x: Tensor, output: Tensor, lo: int, hi: int) -> Tensor:
        gates = self.gates
        if gates.narrow and gates.token_gates is None and gates.strengths.shape[0] == 1:
            A, B = self._with_gates(x)  # the gate is the same everywhere: it is part of B
            return _add(output, F.linear(x, A).reshape(-1, hi - lo), B)
        A, B = _like(self.A[lo:hi], x), _like(self.B[lo:hi], x)
        in_front = x.ndim == 3 and gates.token_gates is not None and gates.in_front(self.name)
        gate = self._gate(x, x.shape[0 if in_front else 1] if x.ndim == 3 else 0, lo, hi)
        h = F.linear(x, A) * (gate.transpose(0, 1) if in_front else gate)
        return _add(output, h.reshape(-1, hi - lo), B)

    def _table(self, tokens: Tensor, output: Tensor, lo: int, hi: int) -> Tensor:
        """Tokens (b, L) of an embedding: their columns of A, times the module's embedding scale if any (Gemma)."""
        if self.gates.mode == "grouped":
            raise InputError(f"The embeddings '{self.name}' do not support a batch with one adapter per part.")
        A, B = _like(self.A[lo:hi], output), _like(self.B[lo:hi], output)
        h = A.T[tokens] * self._gate(output, tokens.shape[-1] if tokens.ndim == 2 else 0, lo, hi)
        scale = getattr(self.module, "embed_scale", None)
        return output + (h @ B if scale is None else h @ B * scale)

    def _conv(self, x: Tensor, output: Tensor, lo: int, hi: int) -> Tensor:
        A, B = _like(self.A[lo:hi], x), _like(self.B[lo:hi], x)
        h = _convolve(self.module, x, A)
        if not self.gates.plain or self.gates.token_gates is not None:
            gate = self._gate(x.flatten(2).transpose(1, 2), h.shape[2] * h.shape[3], lo, hi)
            # (b, R) -> (b, R, 1, 1);  with token gates (b, pixels, R) -> (b, R, height, width)
            gate = gate.reshape(gate.shape[0], -1, gate.shape[-1]).transpose(1, 2)
            h = h * gate.reshape(*gate.shape[:2], *((1, 1) if gate.shape[2] == 1 else h.shape[2:]))
        return (
            output.add_(F.conv2d(h, B.T[..., None, None]))
            if _in_place(output, h)
            else output + F.conv2d(h, B.T[..., None, None])
        )

    def _linear_groups(self, x: Tensor, output: Tensor) -> Tensor:
        blocks = self.gates.blocks
        A, B = self._with_gates(x)
        h = torch.bmm(x.reshape(blocks, -1, x.shape[-1]), A)
        if _in_place(output, h):
            output.view(blocks, -1, output.shape[-1]).baddbmm_(h, B)
            return output
        return output + torch.bmm(h, B).view_as(output)

    def _conv_groups(self, x: Tensor, output: Tensor) -> Tensor:
        A, B = (_like(tensor[self.gates.selection], x) for tensor in self._group_tensors())
        strengths = self.gates.strengths[0, self.gates.selection].to(x)
        parts = zip(x.chunk(self.gates.blocks), A, B, strengths, strict=True)
        return output + torch.cat([F.conv2d(strength * _convolve(self.module, z, a), b) for z, a, b, strength in parts])

    def _with_gates(self, x: Tensor) -> Pair:
        """A and G B of the adapters in use, with G shared by all samples; cached until the gates change.

        Joint (R', in) and (R', out), grouped (n, in, r) and (n, r, out).
        """
        if self._folded is not None and self._version == self.gates.version and self._folded[0].dtype == x.dtype:
            return self._folded
        gates = self.gates
        if gates.mode == "grouped":
            A, B = (_like(tensor[gates.selection], x) for tensor in self._group_tensors())
            gate = gates.strengths[0, gates.selection].view(-1, 1, 1)
        else:
            lo, hi = self.offsets[gates.first], self.offsets[gates.last]
            A, B = _like(self.A[lo:hi], x), _like(self.B[lo:hi], x)
            gate = gates.columns(self.ranks)[0, lo:hi, None]
        folded = A, B if gates.plain else B * gate.to(B)
        if self.A.device == x.device:  # for an offloaded model nothing stays on the device
            self._folded, self._version = folded, gates.version
        return folded

    def _gate(self, x: Tensor, tokens: int, lo: int, hi: int) -> Tensor:
        """The gate of the columns lo..hi, broadcastable to x's leading dimensions."""
        columns = self.gates.columns(self.ranks)[:, lo:hi].to(x)
        gate = columns if x.ndim == 2 else columns.view(columns.shape[0], *[1] * (x.ndim - 2), hi - lo)
        places = self.gates.token_columns(self.name, tokens, self.ranks, lo, hi, x)
        if places is None:
            return gate
        places = places if x.ndim > 2 else places[0]
        return places if self.gates.plain else gate * places

    def delta_rows(self, x: Tensor, strengths: Tensor) -> Tensor:
        """The update without the base, for every row of strengths (rows, N): x (batch, in) -> (batch, rows, out)."""
        A, B = _like(self.A, x), _like(self.B, x)
        gate = strengths.to(x)[:, self.gates.owners(self.ranks).to(x.device)]
        return (F.linear(x, A)[:, None] * gate) @ B

    def _row_scale(self, output: Tensor) -> Tensor:
        """sum_i g_i d_i, shaped to multiply ``output``."""
        assert self.rows is not None
        rows = _like(self.rows, output)
        in_front = output.ndim == 3 and self.gates.token_gates is not None and self.gates.in_front(self.name)
        tokens = output.shape[0 if in_front else 1] if output.ndim == 3 else 0
        tokens = output.shape[2] * output.shape[3] if self.is_conv else tokens
        places = self.gates.token_gates(self.name, tokens) if self.gates.token_gates else None
        if places is not None:
            scale = (self.gates.strengths.to(output)[:, None] * places.to(output)) @ rows  # (1 | b, L, out)
            if self.is_conv:
                size = output.shape[2:] if scale.shape[1] > 1 else (1, 1)
                return scale.transpose(1, 2).unflatten(2, size)
            if output.ndim == 3:
                return scale.transpose(0, 1) if in_front else scale
            return scale[:, 0]
        if self.gates.mode == "grouped":
            strengths = self.gates.strengths[0, self.gates.selection].to(output)
            per_block = strengths[:, None] * rows[self.gates.selection]
            scale = per_block.repeat_interleave(output.shape[0] // self.gates.blocks, 0)
        else:
            scale = self.gates.strengths.to(output) @ rows
        if self.is_conv:
            return scale[:, :, None, None]
        return scale.view(scale.shape[0], *[1] * (output.ndim - 2), scale.shape[1])

    def _group_tensors(self) -> Pair:
        if self._grouped is None:
            self._grouped = _by_adapter(self.A, self.B, self.ranks, self.offsets, self.is_conv)
        return self._grouped


class GatedAdapters:
    """All adapters of a composition on one model.

    Args:
        model: the frozen model; it is not changed until :meth:`attached`.
        adapters: in the order of the gates.
        device, dtype: of the joined matrices; dtype is the model's compute dtype.
        narrow: compute only the columns in use; False keeps shapes fixed for CUDA graphs.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[Adapter],
        device: torch.device,
        dtype: torch.dtype,
        narrow: bool = True,
    ) -> None:
        self.gates = Gates(len(adapters), device, dtype, narrow)
        names = sorted({name for adapter in adapters for name in adapter.layers})
        self.layers = [
            GatedLayer(
                name,
                model.get_submodule(name),
                [adapter.layers.get(name) for adapter in adapters],
                adapters,
                self.gates,
                device,
                dtype,
            )
            for name in names
        ]

    @contextmanager
    def attached(self, without: Collection[str] = (), fold: Collection[Blocks] = ()) -> Iterator[Gates]:
        """Inside, the adapters act on the model; the gates start "off", and the model is restored exactly on exit.

        Args:
            without: names of modules to leave out.
            fold: settings of the gates that are folded into the weights while they hold. Folded weights are computed
                when a setting is first used and kept until the end.
        """
        acting = _Acting([layer for layer in self.layers if layer.name not in without], self.gates, fold)
        try:
            try:
                self.gates.changed = acting.change
                self.gates.off()
                yield self.gates
            finally:
                acting.stop()
        finally:  # again, in case an interrupt came in between
            acting.stop()
            self.gates.changed = lambda blocks: None
            self.gates.off()
            self.gates.tokens_to(None)

    def foldable_bytes(self) -> int:
        """Memory of the folded weights of one block."""
        weights: list[Any] = [layer.module.weight for layer in self.layers if folded.foldable(layer.module)]
        return sum(weight.nbytes for weight in weights)

    def nbytes(self) -> int:
        """Memory of the joined matrices."""
        return sum(layer.nbytes() for layer in self.layers)


class _Acting:
    """Attached layers, acting through folded weights or hooks."""

    def __init__(self, layers: Sequence[GatedLayer], gates: Gates, fold: Collection[Blocks]) -> None:
        self.layers, self.gates, self.fold = layers, gates, frozenset(fold)
        self.foldable = {layer for layer in layers if folded.foldable(layer.module)} if fold else set()
        self.hooks: dict[GatedLayer, RemovableHandle] = {}
        self.overrides = folded.Overrides()
        self.made: dict[Blocks, dict[nn.Module, folded.Forward]] = {}

    def change(self, blocks: Blocks | None) -> None:
        """Called when the gates change (None = they differ per sample or position, or are off)."""
        fold = blocks is not None and blocks in self.fold and self.gates.token_gates is None
        self.overrides.put(self._forwards(blocks) if blocks is not None and fold else {})
        for layer in self.layers:
            if fold and layer in self.foldable:
                if layer in self.hooks:
                    self.hooks[layer].remove()
                    del self.hooks[layer]
            elif layer not in self.hooks:
                self.hooks[layer] = layer.module.register_forward_hook(layer)

    def stop(self) -> None:
        """Restore every module."""
        self.overrides.clear()
        for handle in self.hooks.values():
            handle.remove()

    def _forwards(self, blocks: Blocks) -> dict[nn.Module, folded.Forward]:
        """Forward functions of the layers' modules; a weight is computed when its layer is first called."""
        if blocks not in self.made:
            forwards: dict[nn.Module, folded.Forward] = {}
            self.made[blocks] = forwards
            for layer in self.foldable:
                forwards[layer.module] = partial(self._first, forwards, layer, blocks)
        return self.made[blocks]

    def _first(self, forwards: dict[nn.Module, folded.Forward], layer: GatedLayer, blocks: Blocks, x: Tensor) -> Tensor:
        forward = layer.inside(blocks, x)
        forwards[layer.module] = vars(layer.module)["forward"] = forward
        return forward(x)


def summed(
    name: str, module: nn.Module, adapters: Sequence[Adapter], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The adapters of ``module`` at their strengths as one: A (R, in), B (R, out), and the sum of DoRA's d_i (out,).

    y = W0 x + d * (W0 x) + B^T A x, with every scale, strength and DoRA norm in B; d is None without DoRA.
    """
    layers = [adapter.layers.get(name) for adapter in adapters]
    pairs, rows = _pairs(name, module, layers, adapters, device, dtype)
    A, B = _joined(pairs)
    return A, B, None if rows is None else rows.sum(0)


def _pairs(
    name: str,
    module: nn.Module,
    layers: Sequence[LoraLayer | None],
    adapters: Sequence[Adapter],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[list[Pair | None], Tensor | None]:
    """Each adapter's matrices, and DoRA's d_i (N, out) or None; scaled in fp32 before the cast."""
    pairs: list[Pair | None] = []
    rows: list[Tensor | None] = []
    for layer, adapter in zip(layers, adapters, strict=True):
        if layer is None:
            pairs.append(None)
            rows.append(None)
            continue
        scale = layer.scale * adapter.factors.get(name, 1.0) * adapter.strength
        A, B = layer.A.float(), layer.B.float().flatten(1).T
        row = None
        if layer.magnitude is not None:
            row = dora_rows(_weight(module, name), layer, scale).cpu()
            B = B * (1 + row)
        pairs.append(_cast(name, A, scale * B, scale, device, dtype))
        rows.append(row)
    if all(row is None for row in rows):
        return pairs, None
    size = next(row for row in rows if row is not None)
    return pairs, torch.stack([torch.zeros_like(size) if row is None else row for row in rows]).to(device, dtype)


def dora_rows(weight: Tensor, layer: LoraLayer, scale: float) -> Tensor:
    """d = m / |W0 + s B A| - 1, the norm over everything but the outputs: (out,)."""
    assert layer.magnitude is not None
    product = layer.B.float().flatten(1) @ layer.A.float().flatten(1)
    total = weight.float().cpu().flatten(1) + scale * product.cpu()
    return layer.magnitude.float().cpu() / torch.linalg.vector_norm(total, dim=1) - 1


def _cast(name: str, A: Tensor, B: Tensor, scale: float, device: torch.device, dtype: torch.dtype) -> Pair:
    """Both matrices in the compute dtype; if a large scale overflows B in fp16, it is moved to A.
    Values on the meta device are not checked."""
    for left, right in ((A, B), (A * scale, B / scale)):
        pair = left.to(device, dtype), right.to(device, dtype)
        if all(tensor.is_meta or bool(torch.isfinite(tensor).all()) for tensor in pair):
            return pair
    raise InputError(f"The adapter's values in '{name}' are too large for {dtype}: use fp32 or bf16.")


def _joined(pairs: Sequence[Pair | None]) -> Pair:
    """A_cat and B_cat."""
    present = [pair for pair in pairs if pair is not None]
    if len(present) == 1:
        return present[0][0].contiguous(), present[0][1].contiguous()
    return torch.cat([pair[0] for pair in present]), torch.cat([pair[1] for pair in present])


def _by_adapter(A: Tensor, B: Tensor, ranks: Sequence[int], offsets: Sequence[int], is_conv: bool) -> Pair:
    """The grouped form: views if all ranks are equal, else ranks padded with zeros (which is exact)."""
    rank = max(ranks)
    if any(r != rank for r in ranks):
        joint_A, joint_B = A, B
        A, B = A.new_zeros(len(ranks) * rank, *A.shape[1:]), B.new_zeros(len(ranks) * rank, B.shape[1])
        for i, (r, offset) in enumerate(zip(ranks, offsets, strict=False)):
            A[i * rank : i * rank + r] = joint_A[offset : offset + r]
            B[i * rank : i * rank + r] = joint_B[offset : offset + r]
    down, up = A.view(len(ranks), rank, *A.shape[1:]), B.view(len(ranks), rank, B.shape[1])
    if is_conv:
        return down, up.transpose(1, 2)[..., None, None]
    return down.transpose(1, 2), up


def _add(output: Tensor, h: Tensor, B: Tensor) -> Tensor:
    """output + h B, rows of h being output's positions."""
    if _in_place(output, h):
        output.view(-1, output.shape[-1]).addmm_(h, B)
        return output
    return output + (h @ B).view_as(output)


def _in_place(output: Tensor, h: Tensor) -> bool:
    """Whether ``output`` can be overwritten: contiguous, of the same dtype, and not needed for gradients."""
    return output.is_contiguous() and not output.requires_grad and not h.requires_grad and output.dtype == h.dtype


def _convolve(module: nn.Module, x: Tensor, kernel: Tensor) -> Tensor:
    """x (b, in, height, width) through A, with the stride, padding and dilation of ``module``."""
    assert isinstance(module, nn.Conv2d)
    return F.conv2d(x, kernel, None, module.stride, module.padding, module.dilation)


def _channels(bias: Any, output: Tensor, is_conv: bool) -> Tensor:
    tensor: Tensor = bias.to(output)
    return tensor[:, None, None] if is_conv else tensor


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor`` on x's device in x's dtype (a no-op unless the model is offloaded or autocast)."""
    return tensor if tensor.device == x.device and tensor.dtype == x.dtype else tensor.to(x)


def _weight(module: nn.Module, name: str) -> Tensor:
    """W0, outputs first."""
    own = module.weight
    if not isinstance(own, Tensor) or own.is_meta:
        raise InputError(f"A DoRA adapter needs the weight of '{name}', which is offloaded: compose before offloading.")
    weight = plain_weight(module)
    return weight.T if isinstance(module, Conv1D | nn.Embedding) else weight
