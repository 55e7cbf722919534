"""How exactly a written file holds what it should: every merge and conversion is read back and measured.

For each layer the file's change B A is compared with the exact sum  D = sum_i w_i s_i B_i A_i  of the adapters it was
made from, in fp64:

    error = |B A - D| / |D|     (Frobenius)

B A - D is itself a product of thin matrices, [B, -w_1 s_1 B_1, ...] [A; A_1; ...] = (Q_B R_B) (Q_A R_A)^T, whose norm
is that of R_B R_A^T: no (out, in) matrix is made, and nothing is squared, so that errors of 1e-15 are told from zero.

A result that should be exact may differ by the rounding of the file's dtype: rounding A and B changes B A by at most
about eps |B| |A|. A file that differs by more does not contain the adapters and is not kept.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters import formats
from adapters.errors import InputError
from adapters.formats.fit import module_names
from adapters.formats.lora import TEXT_ENCODERS, LoraFile, LoraLayer

ENTRY = "adapter_studio_accuracy"
"""Metadata entry of a written file with its accuracy, as JSON."""

ROUNDINGS = 4.0
"""Roundings of B and A to the file's dtype (the scale's, the dtype's, and a margin) that an exact result may have."""

Sums = Mapping[tuple[str, str], Sequence[tuple[LoraLayer, float]]]
"""(component, module) -> the layers whose weighted sum it is, as from :func:`adapters.merging.concatenate.summands`."""


@dataclass(frozen=True)
class Accuracy:
    """How far a written file is from the exact sum.

    Attributes:
        layers: how many were compared.
        error: the largest relative error of a layer (Frobenius, in fp64).
        at: "component.module" of that layer.
    """

    layers: int
    error: float
    at: str

    def __str__(self) -> str:
        where = f" at {self.at}" if self.error > 0 else ""
        return f"largest relative error of {self.layers} layers against the exact sum: {self.error:.2g}{where}"

    def entry(self) -> dict[str, str]:
        """Metadata that keeps it in a file."""
        return {ENTRY: json.dumps({"error": self.error, "at": self.at, "layers": self.layers})}


def sums_of(file: LoraFile) -> Sums:
    """The sums of one adapter, to compare a conversion with."""
    return {(component, module): [(layer, 1.0)] for component, module, layer in file.layers()}


def write_checked(
    file: LoraFile,
    path: Path,
    format: str,
    sums: Sums,
    exact: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> tuple[Path, Accuracy]:
    """Write ``file``, read it back, compare it with ``sums``, and keep the accuracy in the file's metadata.

    Args:
        file: what is written.
        path, format, metadata: as for :func:`adapters.formats.write`.
        sums: what it should hold.
        exact: it should hold it up to rounding; False for a method that approximates, which must only write what it
            computed.

    Returns:
        The path, and the accuracy of the file there.

    Raises:
        InputError: the format cannot hold the adapter, or the written file does not contain it; nothing is kept then.
    """
    entries = {key: text for key, text in file.metadata.items() if key != ENTRY}
    file = replace(file, metadata=entries)
    with tempfile.TemporaryDirectory() as folder:
        trial = _read(formats.write(file, Path(folder) / path.name, format, metadata))
        found = measure(trial, sums, exact)
        if not exact:
            measure(trial, sums_of(file), True)
        written = formats.write(file, path, format, {**(metadata or {}), **found.entry()})
        if not _same(_read(written), trial):
            raise InputError(f"'{path.name}' was not written as it should be: the disk may be damaged.")
    return written, found


def measure(file: LoraFile, sums: Sums, exact: bool = True) -> Accuracy:
    """The accuracy of an adapter as read from disk.

    Args:
        file: as read.
        sums: what it should hold.
        exact: refuse more than rounding.

    Raises:
        InputError: layers are missing or too many, or (``exact``) a layer does not hold the sum.
    """
    layers = _matched(file, sums)
    worst, place = 0.0, ""
    for key, layer in layers.items():
        error, rounding = _error(layer, sums[key])
        if exact and not error <= rounding:
            raise InputError(
                f"The result does not contain the adapters: in '{'.'.join(key)}' it differs by {error:.2g} of their "
                f"exact sum, and rounding explains at most {rounding:.2g}. It was not kept."
            )
        if not place or not error <= worst:
            worst, place = error, ".".join(key)
    return Accuracy(len(layers), worst, place)


def _read(path: Path) -> LoraFile:
    return formats.read(path, hashed=lambda place: "")


def _error(layer: LoraLayer, summands: Sequence[tuple[LoraLayer, float]]) -> tuple[float, float]:
    """The relative error of a layer, and the largest that rounding explains."""
    down, up = _factors(layer, 1.0)
    parts = [_factors(one, weight) for one, weight in summands]
    wanted = _norm([A for A, _ in parts], [B for _, B in parts])
    missed = _norm([down, *(A for A, _ in parts)], [up, *(-B for _, B in parts)])
    kind = torch.finfo(layer.A.dtype if layer.A.is_floating_point() else torch.float32)
    size = sum(float(torch.linalg.vector_norm(A) * torch.linalg.vector_norm(B)) for A, B in parts)
    magnitude, rounded = _magnitudes(layer, summands)
    if wanted == 0:
        return max(missed, magnitude), max(ROUNDINGS * kind.eps * size, kind.tiny)
    return max(missed / wanted, magnitude), max(ROUNDINGS * kind.eps * size / wanted, rounded)


def _magnitudes(layer: LoraLayer, summands: Sequence[tuple[LoraLayer, float]]) -> tuple[float, float]:
    """The relative error of DoRA's magnitudes, and what rounding explains; DoRA layers are only converted."""
    wanted = summands[0][0].magnitude
    if wanted is None:
        return 0.0, 0.0
    if layer.magnitude is None or layer.magnitude.numel() != wanted.numel():
        return 1.0, 0.0
    found, wanted = layer.magnitude.flatten().double(), wanted.flatten().double()
    error = float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted).clamp(min=1e-300))
    return error, ROUNDINGS * torch.finfo(layer.magnitude.dtype).eps


def _factors(layer: LoraLayer, weight: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and w s B (out, r) in fp64."""
    return layer.A.double().flatten(1), weight * layer.scale * layer.B.double().flatten(1)


def _norm(down: Sequence[Tensor], up: Sequence[Tensor]) -> float:
    """|[B_1, ...] [A_1; ...]| (Frobenius)."""
    left: Any = torch.linalg.qr(torch.cat(list(up), dim=1), mode="r").R
    right: Any = torch.linalg.qr(torch.cat(list(down)).T, mode="r").R
    return float(torch.linalg.vector_norm(left @ right.T))


def _matched(file: LoraFile, sums: Sums) -> dict[tuple[str, str], LoraLayer]:
    """The layers of a file as read, by the names in ``sums`` (formats write some names in another way)."""
    components = {component for component, _ in sums}
    found: dict[tuple[str, str], LoraLayer] = {}
    strange: list[str] = []
    for component, layers in file.parts.items():
        own = component
        if len(components) == len(file.parts) == 1:  # a file for a single model may name its component otherwise
            own = next(iter(components))
        names = module_names((m for c, m in sums if c == own), file.flat, own in TEXT_ENCODERS)
        for written, layer in layers.items():
            module = names.get(written)
            if module is None:
                strange.append(f"{component}.{written}")
            else:
                found[own, module] = layer
    lost = [f"{component}.{module}" for component, module in sums if (component, module) not in found]
    if strange or lost:
        raise InputError(
            f"The result does not contain the adapters: {len(lost)} of their {len(sums)} layers are missing from it"
            + (f", such as '{lost[0]}'" if lost else "")
            + (f", and {len(strange)} are not theirs, such as '{strange[0]}'" if strange else "")
            + ". It was not kept."
        )
    return found


def _same(first: LoraFile, second: LoraFile) -> bool:
    """Whether two files hold the same numbers."""
    one, other = list(first.layers()), list(second.layers())
    return len(one) == len(other) and all(
        a[:2] == b[:2] and a[2].scale == b[2].scale and _equal(a[2], b[2]) for a, b in zip(one, other, strict=True)
    )


def _equal(first: LoraLayer, second: LoraLayer) -> bool:
    return torch.equal(first.A, second.A) and torch.equal(first.B, second.B)
