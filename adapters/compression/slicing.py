"""Cuts the tensors of a pruned Llama-like model (:mod:`adapters.compression.structure`), or sets them to zero in place.

State dicts are the model's own: "model.layers.0.self_attn.q_proj.weight" (out, in) and so on; other entries pass
through unchanged and are not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters.compression.structure import LAYERS, MEMBERS, Axis, Kept, Member, Pruning, Sizes, check, small_config
from adapters.errors import InputError

State = Mapping[str, Tensor]


def member_of(name: str) -> tuple[int, Member] | None:
    """(block, place in the groups) of a module by its path in the model, or None for others."""
    if not name.startswith(LAYERS):
        return None
    number, _, inner = name.removeprefix(LAYERS).partition(".")
    return (int(number), MEMBERS[inner]) if number.isdigit() and inner in MEMBERS else None


def entries(sizes: Sizes, groups: tuple[int, ...] | None, axis: Axis) -> Tensor | None:
    """The rows or columns of the kept ``groups``, ascending; None = all of them."""
    if groups is None:
        return None
    block = sizes.block(axis)
    return (torch.tensor(groups)[:, None] * block + torch.arange(block)).flatten()


def size(sizes: Sizes, kept: Kept, axis: Axis) -> int:
    """Number of rows or columns that are kept."""
    groups = kept.of(axis)
    return sizes.block(axis) * (sizes.groups(axis) if groups is None else len(groups))


def sliced(state: State, pruning: Pruning) -> dict[str, Tensor]:
    """The state dict of the small model.

    Raises:
        InputError: a tensor has not the sizes of the whole model.
    """
    return _changed(state, pruning, lambda tensor, axis, index: tensor.index_select(axis, index.to(tensor.device)))


def masked(state: State, pruning: Pruning) -> dict[str, Tensor]:
    """The state dict of the whole model with what is pruned at zero; it computes what the small model does."""
    return _changed(state, pruning, _zeroed)


def _zeroed(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    mask = torch.zeros(tensor.shape[axis], dtype=torch.bool, device=tensor.device)
    mask[index.to(tensor.device)] = True
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return torch.where(mask.view(shape), tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))


Cut = Callable[[Tensor, int, Tensor], Tensor]


def _changed(state: State, pruning: Pruning, cut: Cut) -> dict[str, Tensor]:
    check(pruning)
    made = dict(state)
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        found = member_of(module)
        if found is None:
            continue
        number, member = found
        index = entries(pruning.sizes, pruning.layers[number].of(member.axis), member.axis)
        whole = pruning.sizes.block(member.axis) * pruning.sizes.groups(member.axis)
        if index is None or (kind == "bias" and not member.rows):
            continue
        axis = 0 if member.rows else 1
        if tensor.shape[axis] != whole:
            raise InputError(f"'{name}' has {tensor.shape[axis]} entries where the model to prune has {whole}.")
        made[name] = cut(tensor, axis, index)
    return made


# ------------------------------------------------------------------------------------------------ models


def members(model: nn.Module) -> Iterator[tuple[str, int, Member, Any]]:
    """(path, block, place in the groups, module) of the layers that belong to groups."""
    for name, module in model.named_modules():
        found = member_of(name)
        if found is not None:
            yield name, *found, module


def resize(model: nn.Module, pruning: Pruning) -> None:
    """Give the linear layers of a whole model the sizes of the small one; their weights are then undefined."""
    for name, number, member, module in list(members(model)):
        kept = pruning.layers[number]
        if kept.of(member.axis) is None:
            continue
        count = size(pruning.sizes, kept, member.axis)
        out, into = (count, module.in_features) if member.rows else (module.out_features, count)
        weight = module.weight
        made = nn.utils.skip_init(
            nn.Linear, into, out, module.bias is not None, device=weight.device, dtype=weight.dtype
        )
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)


def narrowed(kind: type[Any], pruning: Pruning) -> type[Any]:
    """The class ``kind`` of whole models as one that is built with the sizes of ``pruning``.

    It is used by ``from_pretrained``, also with quantisation, for models whose blocks have different sizes.
    """

    class Narrowed(kind):
        def __init__(self, config: Any, *given: Any, **options: Any) -> None:
            super().__init__(config, *given, **options)
            resize(self, pruning)

    Narrowed.__name__ = Narrowed.__qualname__ = kind.__name__  # the name that configurations record
    Narrowed.__module__ = kind.__module__
    return Narrowed


def small_model(model: Any, pruning: Pruning) -> Any:
    """The pruned form of ``model``, a causal model of transformers; tensors that are not cut are shared with it."""
    config = type(model.config).from_dict(small_config(model.config.to_dict(), pruning))
    kind = type(model) if pruning.uniform else narrowed(type(model), pruning)
    made = kind.from_pretrained(
        None, config=config, state_dict=sliced(model.state_dict(), pruning), dtype=next(model.parameters()).dtype
    )
    made.generation_config = model.generation_config
    return made.to(model.device).eval()
