"""Train Small, Infer Large: Memory-Efficient LoRA Training for Large Language Models (LoRAM), arXiv 2502.13533.

    prune     W0 -> W0[K] (heads and channels in whole groups; the first 4 and last 2 blocks stay whole)
    align     optional, by whoever publishes the small model: its weights are trained on general text
    train     an ordinary LoRA (A, B, s) of the small model, which may be quantised (QLoRAM)
    recover   zeros where something was pruned:
                 q, k, v, gate, up:   B_R[K, :] = B, other rows 0;     A_R = A
                 o, down:             A_R[:, K] = A, other columns 0;  B_R = B
    infer     y = W0 x + s B_R A_R x on the original, unpruned and un-aligned model

Kept counts in a pruned block (m channels, kv key-value heads, share p): m - ceil(m p) channels; kv - int(kv p) heads
with grouped queries, int(h (1 - p)) without. These rules give every reduction ratio of the paper's tables. Stored: the
small model with ``pruning.json``, and the recovered adapter, an ordinary LoRA of the original.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import torch

from adapters.catalogue import Method
from adapters.compression.importance import Scores, best
from adapters.compression.slicing import entries, member_of, size
from adapters.compression.structure import (
    Kept,
    Pruning,
    Sizes,
    check,
    check_ratio,
    prunable,
    removed,
    with_whole_blocks,
)
from adapters.errors import InputError
from adapters.formats.lora import LoraLayer

METHOD = Method(
    name="loram",
    title="LoRAM",
    summary="Trains the LoRA on a pruned copy of the base, then pads it with zeros: for bases that fit to run but not "
    "to train.",
    stage="compression",
    makes="ordinary LoRA",
    paper="LoRAM, arXiv 2502.13533",
    entry="adapters.compression.loram:recovered",
)

KEEP_FIRST, KEEP_LAST = 4, 2
"""Blocks that stay whole in the paper."""


def kept_counts(sizes: Sizes, ratio: float) -> tuple[int, int]:
    """(key-value heads, channels) kept of a pruned block.

    Raises:
        InputError: a ratio outside [0, 1), or one that leaves no head or no channel.
    """
    check_ratio(ratio)
    share = Fraction(str(ratio))
    channels = sizes.channels - math.ceil(sizes.channels * share)
    grouped = sizes.heads != sizes.kv_heads
    heads = sizes.kv_heads - removed(sizes.kv_heads, ratio) if grouped else int(sizes.kv_heads * (1 - share))
    if not heads or not channels:
        what = "head" if not heads else "channel"
        raise InputError(f"Pruning {ratio:g} leaves no {what} of {sizes.kv_heads if not heads else sizes.channels}.")
    return heads, channels


def blocks(sizes: Sizes, ratio: float, keep_first: int = KEEP_FIRST, keep_last: int = KEEP_LAST) -> range:
    """The blocks that are pruned; none at ratio 0.

    Raises:
        InputError: as :func:`kept_counts`; or the protected blocks leave none.
    """
    check_ratio(ratio)
    return prunable(sizes, keep_first, keep_last) if ratio else range(0)


def plan(sizes: Sizes, scores: Mapping[int, Scores], ratio: float, method: str) -> Pruning:
    """The pruning that keeps the best groups of the blocks with ``scores``."""
    heads, channels = kept_counts(sizes, ratio)
    return with_whole_blocks(Pruning(sizes, best(sizes, scores, heads, channels), f"loram {method}", ratio))


def sized(sizes: Sizes, ratio: float, keep_first: int = KEEP_FIRST, keep_last: int = KEEP_LAST) -> Pruning:
    """A pruning of the right counts whatever is chosen (the first groups), for estimates."""
    heads, channels = kept_counts(sizes, ratio)
    chosen = blocks(sizes, ratio, keep_first, keep_last)
    kept = Kept(tuple(range(heads)), tuple(range(channels)))
    return with_whole_blocks(
        Pruning(sizes, tuple(kept if i in chosen else Kept() for i in range(sizes.layers)), "loram", ratio)
    )


def recovered(layers: Mapping[str, LoraLayer], pruning: Pruning) -> dict[str, LoraLayer]:
    """An adapter of the small model as one of the whole model: module path -> layer, in the same precision.

    Raises:
        InputError: shapes that are not the small model's (an adapter of another pruning, or of the whole model), or
            DoRA, whose norms are those of the small weights.
    """
    check(pruning)
    return {name: _recovered(name, layer, pruning) for name, layer in layers.items()}


def shrunk(layers: Mapping[str, LoraLayer], pruning: Pruning) -> dict[str, LoraLayer]:
    """An adapter of the whole model cut to the small one: the inverse of :func:`recovered` on what is kept."""
    check(pruning)
    made = {}
    for name, layer in layers.items():
        found = member_of(name)
        index = None if found is None else entries(pruning.sizes, pruning.layers[found[0]].of(found[1].axis),
                                                   found[1].axis)  # fmt: skip
        if found is None or index is None:
            made[name] = layer
        elif layer.magnitude is not None:
            raise InputError("A DoRA adapter cannot be cut: its norms are those of the whole weights.")
        elif found[1].rows:
            made[name] = replace(layer, B=layer.B[index].contiguous())
        else:
            made[name] = replace(layer, A=layer.A[:, index].contiguous())
    return made


def _recovered(name: str, layer: LoraLayer, pruning: Pruning) -> LoraLayer:
    found = member_of(name)
    if found is None:
        return layer
    number, member = found
    kept, sizes = pruning.layers[number], pruning.sizes
    index = entries(sizes, kept.of(member.axis), member.axis)
    given = layer.B.shape[0] if member.rows else layer.A.shape[1]
    wanted, whole = size(sizes, kept, member.axis), sizes.block(member.axis) * sizes.groups(member.axis)
    if given != wanted:
        made_for = "the whole model" if given == whole else "another pruning"
        raise InputError(f"The adapter's layer '{name}' has {given} entries, the pruned model {wanted}: it belongs to "
                         f"{made_for}.")  # fmt: skip
    if index is None:
        return layer
    if layer.magnitude is not None:
        raise InputError("A DoRA adapter of a pruned model cannot be recovered: its norms are those of the small "
                         "weights. Train without use_dora.")  # fmt: skip
    if member.rows:
        B = layer.B.new_zeros(whole, *layer.B.shape[1:])
        B[index] = layer.B
        return replace(layer, B=B)
    A = layer.A.new_zeros(layer.A.shape[0], whole, *layer.A.shape[2:])
    A[:, index] = layer.A
    return replace(layer, A=A)


def is_recovered(layers: Mapping[str, LoraLayer], pruning: Pruning) -> bool:
    """Whether everything pruned is exactly zero in an adapter of the whole model."""
    back = recovered(shrunk(layers, pruning), pruning)
    return all(torch.equal(back[n].A, one.A) and torch.equal(back[n].B, one.B) for n, one in layers.items())


__all__: Sequence[str] = (
    "KEEP_FIRST", "KEEP_LAST", "METHOD", "blocks", "is_recovered", "kept_counts", "plan", "recovered", "shrunk", "sized"
)  # fmt: skip
