"""How much each group of a Llama-like model matters, from a score of every single weight.

The score of a group is the sum over the entries of its members (:mod:`adapters.compression.structure`):

    magnitude    |W|                 (no data)
    taylor       |W o G|             G = dL/dW, mean over some batches (LLM-Pruner, arXiv 2305.11627, section 3.2)
    random       uniform numbers
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters.compression.slicing import members
from adapters.compression.structure import Kept, Member, Sizes
from adapters.errors import InputError


@dataclass
class Scores:
    """Scores of one block's groups: heads (kv_heads,) and channels (channels,), in fp32 or higher."""

    heads: Tensor
    channels: Tensor

    def of(self, member: Member) -> Tensor:
        return self.channels if member.axis == "channel" else self.heads


def empty(sizes: Sizes, blocks: Iterable[int], dtype: torch.dtype = torch.float32) -> dict[int, Scores]:
    """Zero scores of some blocks."""
    return {
        number: Scores(torch.zeros(sizes.kv_heads, dtype=dtype), torch.zeros(sizes.channels, dtype=dtype))
        for number in blocks
    }


def by_group(score: Tensor, member: Member, sizes: Sizes) -> Tensor:
    """Sums of a layer's score (out, in) over the entries of each group: (groups,)."""
    along = score.sum(1 if member.rows else 0)
    return along.reshape(sizes.groups(member.axis), sizes.block(member.axis)).sum(1)


def summed(
    model: nn.Module, sizes: Sizes, blocks: Sequence[int], score: Callable[[str, Any], Tensor]
) -> dict[int, Scores]:
    """Scores of the groups of ``blocks``; ``score(path, layer)`` is that of a layer's weight (out, in)."""
    found = empty(sizes, blocks)
    for name, number, member, module in members(model):
        if number in found:
            found[number].of(member).add_(by_group(score(name, module).float().cpu(), member, sizes))
    return found


def magnitude(model: nn.Module, sizes: Sizes, blocks: Sequence[int]) -> dict[int, Scores]:
    """Sums of |W|."""
    return summed(model, sizes, blocks, lambda _, layer: layer.weight.detach().abs())


def random(sizes: Sizes, blocks: Sequence[int], seed: int) -> dict[int, Scores]:
    """Uniform numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        number: Scores(torch.rand(sizes.kv_heads, generator=generator), torch.rand(sizes.channels, generator=generator))
        for number in blocks
    }


def taylor(
    model: nn.Module, sizes: Sizes, blocks: Sequence[int], losses: Iterable[Callable[[], Tensor]]
) -> dict[int, Scores]:
    """Sums of |W o G|, with G the mean gradient of ``losses``; the model is left without gradients.

    Needs one gradient for every weight of the blocks.

    Raises:
        InputError: there is no loss, or one is not finite.
    """
    weights = [module.weight for _, number, _, module in members(model) if number in set(blocks)]
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    count = 0
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        for loss in losses:
            value = loss()
            if not bool(value.isfinite()):
                raise InputError("The loss of the rows that importance is measured on is not finite.")
            value.backward()
            count += 1
        if not count:
            raise InputError("Importance by 'taylor' is measured on rows of data, and there are none.")
        return summed(model, sizes, blocks, lambda _, layer: (layer.weight.detach() * layer.weight.grad / count).abs())
    finally:
        for parameter, learns in before.items():
            parameter.requires_grad_(learns)
            parameter.grad = None


def highest(scores: Tensor, count: int) -> tuple[int, ...]:
    """The ``count`` groups with the highest scores, ascending; of equal ones the first."""
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return tuple(sorted(int(index) for index in order))


def best(sizes: Sizes, scores: Mapping[int, Scores], heads: int, channels: int) -> tuple[Kept, ...]:
    """What is kept of every block: so many heads and channels of those with scores, all of the others."""
    return tuple(
        Kept(highest(scores[number].heads, heads), highest(scores[number].channels, channels))
        if number in scores else Kept()
        for number in range(sizes.layers)
    )  # fmt: skip
