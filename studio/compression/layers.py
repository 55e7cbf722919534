"""What is left of every layer of a smaller base: bits of its matrices, or heads and channels. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.compression.structure import Pruning, read_pruning
from pipelines.language.compressed import Matrix, read_manifest


@dataclass(frozen=True)
class Left:
    """One figure per layer: ``title``, layer -> value, and how a value is written."""

    title: str
    values: Mapping[str, float]
    shape: str


def of_base(folder: str | Path) -> list[Left]:
    """The figures of the base in ``folder``; empty if it is not a smaller one."""
    manifest = read_manifest(folder)
    if manifest is not None:
        return [Left("Bits per weight, layer by layer", bits_by_layer(manifest.matrices), "{:.2f}")]
    pruning = read_pruning(Path(folder))
    return [] if pruning is None else of_pruning(pruning)


def of_job(result: Mapping[str, Any] | None) -> list[Left]:
    """The figures of what a finished compression made: its base, or the pruned one that its adapter learnt on."""
    return next((of_base(result[key]) for key in ("path", "base", "pruned") if result and result.get(key)), [])


def of_pruning(pruning: Pruning) -> list[Left]:
    """Heads and channels kept of every layer; nothing where zeros are in place."""
    if pruning.mask:
        return []
    names = ("Key-value heads kept, layer by layer", "Channels kept, layer by layer")
    return [
        Left(name, {str(layer): float(pair[number]) for layer, pair in enumerate(pruning.counts())}, "{:.0f}")
        for number, name in enumerate(names)
    ]


def bits_by_layer(matrices: Mapping[str, Matrix]) -> dict[str, float]:
    """Mean bits per weight of each numbered layer, in order."""
    sums: dict[int, tuple[float, int]] = {}
    for name, matrix in matrices.items():
        found = re.search(r"\.(\d+)\.", f".{name}.")
        layer, count = int(found.group(1)) if found else -1, matrix.shape[0] * matrix.shape[1]
        bits, before = sums.get(layer, (0.0, 0))
        sums[layer] = bits + bits_of(matrix.how) * count, before + count
    return {str(layer) if layer >= 0 else "other": bits / count for layer, (bits, count) in sorted(sums.items())}


def bits_of(how: str) -> float:
    """Bits per weight of a matrix stored as ``nf3-8-bf16-64-16`` or ``int4-64``, its scales included."""
    kind, *rest = how.split("-")
    if kind.startswith("int"):
        return float(kind[3:]) + 64 / int(rest[0])
    scale, precision, block, blocks = rest
    return float(kind[2:]) + int(scale) / int(block) + int(precision[2:]) / (int(block) * int(blocks))
