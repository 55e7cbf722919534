"""Structured pruning of Llama-like models: which weights go together, and what is left.

A group is everything that must disappear together:

    head h      rows of k and v of key-value head h, rows of q and columns of o of its query heads
    channel c   row c of gate and of up, column c of down

With grouped queries (GQA) n = heads / kv_heads query heads belong to one key-value head; their rows in q are the block
[h n d, (h + 1) n d), d = head_dim. Whole groups go, so a pruned layer computes exactly what the whole one does with
those heads and channels at zero. Embeddings, norms, the head and the width of the model stay.

Everything here is plain numbers: configurations, counts and indices. :mod:`adapters.compression.slicing` cuts tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from adapters.errors import InputError
from adapters.files import write_text

FILE = "pruning.json"
"""Beside the weights of a pruned model: what was kept of which base."""

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose blocks are as above."""

LAYERS = "model.layers."
"""Prefix of the blocks' names in a state dict."""

Axis = Literal["query", "kv", "channel"]


@dataclass(frozen=True)
class Member:
    """How one linear layer of a block belongs to the groups.

    Attributes:
        axis: what its rows (outputs) or columns (inputs) are: blocks of query heads, key-value heads, channels.
        rows: whether the groups are rows; else columns.
    """

    axis: Axis
    rows: bool


MEMBERS: Mapping[str, Member] = {
    "self_attn.q_proj": Member("query", True),
    "self_attn.k_proj": Member("kv", True),
    "self_attn.v_proj": Member("kv", True),
    "self_attn.o_proj": Member("query", False),
    "mlp.gate_proj": Member("channel", True),
    "mlp.up_proj": Member("channel", True),
    "mlp.down_proj": Member("channel", False),
}
"""Linear layer of a block -> its place in the groups."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Llama-like model.

    Attributes:
        hidden: width; ``channels``: of the feed-forward layers (intermediate_size).
        layers: number of blocks; ``heads``: query heads; ``kv_heads``: key-value heads; ``head_dim``: d.
        vocabulary: rows of the embedding; ``tied``: the head is the embedding.
        biases: names in :data:`MEMBERS` of the layers that have one.
        head_norms: queries and keys have a norm of their own (Qwen3).
    """

    hidden: int
    channels: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    biases: tuple[str, ...] = ()
    head_norms: bool = False

    @property
    def repeats(self) -> int:
        """Query heads of one key-value head."""
        return self.heads // self.kv_heads

    def block(self, axis: Axis) -> int:
        """Rows or columns of one group."""
        return {"query": self.repeats * self.head_dim, "kv": self.head_dim, "channel": 1}[axis]

    def groups(self, axis: Axis) -> int:
        """Number of groups."""
        return self.channels if axis == "channel" else self.kv_heads


def sizes_of(config: Any) -> Sizes:
    """The sizes in a transformers configuration (or its dict).

    Raises:
        InputError: another architecture, a quantised model, or heads that do not divide into key-value heads.
    """
    plain: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    kind = str(plain.get("model_type"))
    if kind not in ARCHITECTURES:
        raise InputError(
            f"A '{kind}' model cannot be pruned: its blocks must be like Llama's ({', '.join(ARCHITECTURES)})."
        )
    if plain.get("quantization_config"):
        raise InputError("A quantised model cannot be pruned: prune the original, and quantise the result.")
    heads = int(plain["num_attention_heads"])
    kv_heads = int(plain.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise InputError(f"{heads} heads do not divide into {kv_heads} key-value heads: this model cannot be pruned.")
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    biased: tuple[str, ...] = ()
    if kind == "qwen2":
        biased = attention[:3]
    elif plain.get("attention_bias"):
        biased = attention
    return Sizes(
        hidden=int(plain["hidden_size"]), channels=int(plain["intermediate_size"]),
        layers=int(plain["num_hidden_layers"]), heads=heads, kv_heads=kv_heads,
        head_dim=int(plain.get("head_dim") or plain["hidden_size"] // heads), vocabulary=int(plain["vocab_size"]),
        tied=bool(plain.get("tie_word_embeddings")), head_norms=kind == "qwen3",
        biases=(*(f"self_attn.{name}" for name in biased),
                *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj") if plain.get("mlp_bias"))),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ what is kept


@dataclass(frozen=True)
class Kept:
    """What is kept of one block, ascending; None = everything.

    Attributes:
        heads: key-value heads (with their query heads).
        channels: feed-forward channels.
    """

    heads: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None

    def of(self, axis: Axis) -> tuple[int, ...] | None:
        return self.channels if axis == "channel" else self.heads


@dataclass(frozen=True)
class Pruning:
    """What was kept of a model, block by block; beside the weights as :data:`FILE`.

    Attributes:
        sizes: of the whole model.
        layers: one entry per block.
        method: how the groups were chosen ("loram random", "loraprune" ...).
        ratio: share of the groups that was asked to go, in the blocks that are pruned.
        base: fingerprint of the whole model's weights; ``base_name``: what it was called.
        aligned: the small model was trained further, so that its weights are no longer the base's.
        zeros: share of zeros in the pruned blocks' linear layers, where nothing is cut but weights are zero instead
            (:mod:`adapters.compression.sparsity`); ``mask``: digest of what stays of them.
    """

    sizes: Sizes
    layers: tuple[Kept, ...]
    method: str = ""
    ratio: float = 0.0
    base: str = ""
    base_name: str = ""
    aligned: bool = False
    zeros: float = 0.0
    mask: str = ""

    def counts(self) -> list[tuple[int, int]]:
        """(key-value heads, channels) of every block."""
        whole = self.sizes
        return [
            (whole.kv_heads if kept.heads is None else len(kept.heads),
             whole.channels if kept.channels is None else len(kept.channels))
            for kept in self.layers
        ]  # fmt: skip

    @property
    def uniform(self) -> bool:
        """All blocks have the same sizes, so that an ordinary configuration describes the small model."""
        return len(set(self.counts())) == 1

    @property
    def identity(self) -> str:
        """Changes with the base and with every kept index, not with the alignment."""
        told = json.dumps([self.base, [asdict(kept) for kept in self.layers], *([self.mask] if self.mask else [])])
        return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()

    def write(self, folder: Path) -> Path:
        """Write ``folder/pruning.json``."""
        entries = {"version": 1, "identity": self.identity, **asdict(self)}
        return write_text(folder / FILE, json.dumps(entries) + "\n")


def read_pruning(folder: Path) -> Pruning | None:
    """The pruning of a model's folder; None if it was not pruned.

    Raises:
        InputError: the file is damaged or its indices are impossible.
    """
    place = folder / FILE
    if not place.is_file():
        return None
    try:
        given = json.loads(place.read_text(encoding="utf-8"))
        sizes = Sizes(**{**given["sizes"], "biases": tuple(given["sizes"]["biases"])})
        layers = tuple(Kept(*(_indices(kept[part]) for part in ("heads", "channels"))) for kept in given["layers"])
        found = Pruning(
            sizes, layers, str(given["method"]), float(given["ratio"]), str(given["base"]),
            str(given.get("base_name", "")), bool(given["aligned"]), float(given.get("zeros", 0)),
            str(given.get("mask", "")),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{place}' is damaged ({error}): prune the model again.") from None
    check(found)
    return found


def _indices(given: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if given is None else tuple(int(index) for index in given)


def check(pruning: Pruning) -> None:
    """Refuse impossible indices.

    Raises:
        InputError: an entry missing, an index out of range, twice, or out of order, or a block with nothing left.
    """
    sizes = pruning.sizes
    if len(pruning.layers) != sizes.layers:
        raise InputError(f"The pruning names {len(pruning.layers)} layers, but the model has {sizes.layers}.")
    for number, kept in enumerate(pruning.layers):
        for name, indices, most in (("head", kept.heads, sizes.kv_heads), ("channel", kept.channels, sizes.channels)):
            if indices is None:
                continue
            if not indices:
                raise InputError(f"Layer {number} would keep no {name}: lower the ratio.")
            if indices != tuple(sorted(set(indices))) or indices[0] < 0 or indices[-1] >= most:
                raise InputError(
                    f"Layer {number}: the kept {name}s must be ascending, each once, between 0 and {most - 1}."
                )


# ------------------------------------------------------------------------------------------------ counts


def prunable(sizes: Sizes, keep_first: int, keep_last: int) -> range:
    """The blocks between those that stay whole.

    Raises:
        InputError: none is left.
    """
    found = range(keep_first, sizes.layers - keep_last)
    if not found:
        raise InputError(
            f"The model has {sizes.layers} layers; keeping the first {keep_first} and the last {keep_last} whole "
            "leaves none to prune: keep fewer."
        )
    return found


def check_ratio(ratio: float) -> None:
    """Raise :class:`InputError` unless 0 <= ratio < 1."""
    if not (math.isfinite(ratio) and 0 <= ratio < 1):
        raise InputError(f"The share to prune is {ratio:g}, but it must be 0 or more and below 1.")


def removed(groups: int, ratio: float) -> int:
    """int(groups * ratio), without the errors of binary fractions."""
    return int(groups * Fraction(str(ratio)))


def parameters(sizes: Sizes, counts: Sequence[tuple[int, int]] | None = None) -> int:
    """Parameters of the whole model (embedding, norms and head included), from sizes alone.

    Args:
        counts: (key-value heads, channels) of every block; None = nothing is pruned.
    """
    return linear_parameters(sizes, counts) + other_parameters(sizes, counts)


def linear_parameters(sizes: Sizes, counts: Sequence[tuple[int, int]] | None = None) -> int:
    """Weights of the linear layers inside the blocks, which quantisation stores in few bits."""
    counts = counts or [(sizes.kv_heads, sizes.channels)] * sizes.layers
    per_head = 2 * (sizes.block("query") + sizes.block("kv"))  # q and o; k and v
    return sum(sizes.hidden * (per_head * heads + 3 * channels) for heads, channels in counts)


def other_parameters(sizes: Sizes, counts: Sequence[tuple[int, int]] | None = None) -> int:
    """Embedding, head, norms and biases."""
    counts = counts or [(sizes.kv_heads, sizes.channels)] * sizes.layers
    tables = sizes.vocabulary * sizes.hidden * (1 if sizes.tied else 2)
    norms = sizes.hidden * (1 + 2 * sizes.layers) + (2 * sizes.head_dim * sizes.layers if sizes.head_norms else 0)
    biases = 0
    for heads, channels in counts:
        for name in sizes.biases:
            member = MEMBERS[name]
            kept = channels if member.axis == "channel" else heads
            biases += sizes.block(member.axis) * kept if member.rows else sizes.hidden
    return tables + norms + biases


@dataclass(frozen=True)
class Reduction:
    """How much smaller a pruned model is.

    Attributes:
        whole, small: parameters.
        nominal: whole / small, as papers count it; with a quantised small model 16 / bits times that, as if all its
            parameters had so many bits.
        counted: bytes of the whole model in 16 bits over bytes of the small one, whose embeddings, head, norms and
            biases stay in 16 bits and whose linear layers take ``bits`` and their constants.
        whole_bytes, small_bytes: those bytes.
    """

    whole: int
    small: int
    nominal: float
    counted: float
    whole_bytes: int
    small_bytes: int


NF4_BITS = 4.127
"""Bits per weight of NF4 with double quantisation, blocks of 64 and 256 (QLoRA, arXiv 2305.14314, section 3)."""


def reduction(pruning: Pruning, quantised: bool = False) -> Reduction:
    """Parameters and bytes before and after; ``quantised``: the small model's linear layers are in NF4."""
    counts = pruning.counts()
    whole, small = parameters(pruning.sizes), parameters(pruning.sizes, counts)
    linear, other = linear_parameters(pruning.sizes, counts), other_parameters(pruning.sizes, counts)
    small_bytes = math.ceil((linear * (NF4_BITS if quantised else 16) + other * 16) / 8)
    return Reduction(
        whole, small, whole / small * (4 if quantised else 1), 2 * whole / small_bytes, 2 * whole, small_bytes
    )


# ------------------------------------------------------------------------------------------------ configurations


def small_config(config: Mapping[str, Any], pruning: Pruning) -> dict[str, Any]:
    """The configuration of the pruned model, ``head_dim`` explicit.

    Where all blocks have the same sizes it is an ordinary one. Otherwise it keeps the sizes of the whole model, and
    :data:`FILE` beside it says what each block has (transformers' ``per_layer_config`` is not used by Llama).
    """
    made = {**config, "head_dim": pruning.sizes.head_dim}
    if pruning.uniform:
        heads, channels = pruning.counts()[0]
        made |= {"num_key_value_heads": heads, "num_attention_heads": heads * pruning.sizes.repeats,
                 "intermediate_size": channels}  # fmt: skip
    return made


def with_whole_blocks(pruning: Pruning) -> Pruning:
    """The same, where complete lists of heads or channels are written as None."""
    sizes = pruning.sizes

    def shortened(kept: Kept) -> Kept:
        return Kept(
            None if kept.heads is not None and len(kept.heads) == sizes.kv_heads else kept.heads,
            None if kept.channels is not None and len(kept.channels) == sizes.channels else kept.channels,
        )

    return replace(pruning, layers=tuple(map(shortened, pruning.layers)))
