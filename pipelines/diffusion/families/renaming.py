"""Names that other programs give to the modules of a family, as diffusers' names.

Adapter files for the original modules join layers that diffusers separates: ``qkv`` has the rows of q, k and v (where
several queries share a key, fewer of k and v), ``kv`` those of k and v. Before the last projection some have shift and
scale in the other order. Names are compared flat, with "_" for ".", as kohya writes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adapters.errors import InputError
from adapters.formats.original_names import swapped

if TYPE_CHECKING:
    from adapters.formats.lora import LoraFile, LoraLayer

Rule = tuple[str, tuple[str, ...]]
"""Regular expression of a whole flat name -> the flat names of diffusers' modules (two for joined k and v, three for
q, k and v)."""


def renamed(file: LoraFile, component: str, rules: Sequence[Rule], shifted: str = "") -> LoraFile:
    """``file`` with diffusers' names for the layers of ``component``; unchanged if no rule applies.

    Args:
        shifted: diffusers' flat name of a layer that has scale and shift where the other name has shift and scale.

    Raises:
        InputError: joined rows that cannot be split, or two layers for one module.
    """
    layers = file.parts.get(component, {})
    made: dict[str, LoraLayer] = {}
    changed = False
    for written, layer in layers.items():
        pieces = _pieces(written.replace(".", "_"), layer, rules)
        if pieces and shifted in pieces:
            pieces = {shifted: swapped(pieces[shifted])}
        changed = changed or pieces is not None
        for name, piece in (pieces or {written.replace(".", "_"): layer}).items():
            if name in made:
                raise InputError(f"The adapter has two layers for the module '{name}': save it with one program.")
            made[name] = piece
    if not changed:
        return file
    others = {
        part: {name.replace(".", "_"): layer for name, layer in found.items()} for part, found in file.parts.items()
    }
    return file.with_parts({**others, component: made}, flat=True)


def _pieces(flat: str, layer: LoraLayer, rules: Sequence[Rule]) -> Mapping[str, LoraLayer] | None:
    for pattern, names in rules:
        match = re.fullmatch(pattern, flat)
        if match:
            parts = [layer] if len(names) == 1 else _rows(layer, flat, len(names))
            return {match.expand(name): part for name, part in zip(names, parts, strict=True)}
    return None


def _rows(layer: LoraLayer, written: str, count: int) -> list[LoraLayer]:
    """Layers of q (as many rows as inputs), k and v (the rest in halves), or of k and v alone."""
    import torch

    rows, inputs = layer.B.shape[0], layer.A.shape[1]
    first = [inputs] if count == 3 else []
    other, left = divmod(rows - sum(first), 2)
    if layer.A.ndim != 2 or other < 1 or left:
        joined = "q, k and v" if first else "k and v"
        raise InputError(f"'{written}' joins {joined}, but {rows} rows for {inputs} inputs cannot be split so.")
    sizes = [*first, other, other]
    magnitudes = [None] * count if layer.magnitude is None else list(torch.split(layer.magnitude, sizes))
    return [
        replace(layer, B=B.contiguous(), magnitude=magnitude)
        for B, magnitude in zip(torch.split(layer.B, sizes), magnitudes, strict=True)
    ]
