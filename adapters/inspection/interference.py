"""How much the updates of two adapters interfere, from their weights alone.

For a layer both change, D_i = s B_i A_i and D_j likewise. Q_A (in, r) is an orthonormal basis of the rows of A: the
input directions an adapter reads. Q_B (out, r) is one of the columns of B: the output directions it writes.

    inputs     |Q_Ai^T Q_Aj|_F^2 / min(r_i, r_j)      mean squared cosine of the principal angles of the rows of A
    outputs    |Q_Bi^T Q_Bj|_F^2 / min(r_i, r_j)      the same for the columns of B
    shared     1/2 (|P_Bi D_j P_Ai|_F^2 / |D_j|_F^2 + |P_Bj D_i P_Aj|_F^2 / |D_i|_F^2),   P = Q Q^T
    cosine     <D_i, D_j> / (|D_i| |D_j|)

"shared" is the part of one update that reads and writes the directions of the other: 0 if the updates are orthogonal on
either side, 1 if they lie in the same subspaces. For random subspaces it would be the mean of r_i / in * r_i / out and
the same with j, which is reported as "chance". Means over layers are weighted by |D_i| |D_j|, so that layers count in
which both adapters are strong; layers that only one of them changes count as no overlap, by that adapter's energy.

Everything is computed on the factors, never on a full matrix. A convolution is the matrix of its kernel. For a DoRA
layer only the low-rank part is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.errors import FamilyError
from adapters.formats.lora import LoraFile, LoraLayer


@dataclass(frozen=True)
class LayerOverlap:
    """One layer that both adapters change.

    Attributes:
        inputs, outputs: overlap of the rows of A and of the columns of B, 0 to 1.
        shared: part of the updates in each other's subspaces, 0 to 1.
        chance: "shared" of random subspaces of these ranks.
        cosine: between the two updates, -1 to 1.
        first, second: Frobenius norms of the two updates.
    """

    inputs: float
    outputs: float
    shared: float
    chance: float
    cosine: float
    first: float
    second: float


@dataclass(frozen=True, eq=False)
class Overlap:
    """The overlap of two adapters.

    Attributes:
        layers: layer -> its overlap, for layers that both change.
        interference: energy-weighted mean of "shared" over all layers of both.
        chance: the same mean of "chance".
        inputs, outputs, cosine: means over the layers both change, weighted by energy.
        common: part of the two adapters' energy that lies in layers both change.
    """

    layers: Mapping[str, LayerOverlap]
    interference: float
    chance: float
    inputs: float
    outputs: float
    cosine: float
    common: float


@dataclass(frozen=True, eq=False)
class Update:
    """One layer's update in orthonormal factors.

    Attributes:
        rows: Q_A (in, r).
        columns: Q_B (out, r).
        core: Q_B^T D Q_A (r, r), so that D = Q_B core Q_A^T.
    """

    rows: Tensor
    columns: Tensor
    core: Tensor

    @property
    def norm(self) -> float:
        return float(torch.linalg.vector_norm(self.core))


def update(layer: LoraLayer) -> Update:
    """The update of ``layer`` in orthonormal factors, fp64."""
    A, B = layer.A.double().flatten(1), layer.scale * layer.B.double().flatten(1)
    rows, right = torch.linalg.qr(A.T)
    columns, left = torch.linalg.qr(B)
    return Update(rows, columns, left @ right.T)


def updates(file: LoraFile) -> dict[str, Update]:
    """layer -> update, for a whole adapter; layers are named by :func:`plain_name`."""
    return {plain_name(component, module): update(layer) for component, module, layer in file.layers()}


def plain_name(component: str, module: str) -> str:
    """The name of a layer without dots, which is the same in files of all formats."""
    return f"{component}.{module.replace('.', '_').removeprefix('text_model_')}"


def compare(first: Mapping[str, Update], second: Mapping[str, Update]) -> Overlap:
    """The overlap of two adapters.

    Raises:
        FamilyError: a layer differs in size, so the adapters were made for different base models.
    """
    layers = {
        name: compare_layer(first[name], second[name], name)
        for name in sorted(first.keys() & second.keys())
        if first[name].norm > 0 and second[name].norm > 0
    }
    weights = {name: layer.first * layer.second for name, layer in layers.items()}
    energy = _energy(first), _energy(second)
    common = sum(layer.first**2 for layer in layers.values()), sum(layer.second**2 for layer in layers.values())
    part = (common[0] / energy[0] * common[1] / energy[1]) ** 0.5 if min(energy) > 0 else 0.0
    total = sum(weights.values())

    def mean(attribute: str) -> float:
        return sum(weights[name] * getattr(layers[name], attribute) for name in layers) / total if total else 0.0

    return Overlap(
        layers, part * mean("shared"), part * mean("chance"), mean("inputs"), mean("outputs"), mean("cosine"), part
    )


def compare_layer(first: Update, second: Update, name: str = "") -> LayerOverlap:
    """The overlap of two updates of one layer; raises :class:`FamilyError` when their sizes differ."""
    sizes = [(part.columns.shape[0], part.rows.shape[0]) for part in (first, second)]
    if sizes[0] != sizes[1]:
        raise FamilyError(
            f"The layer '{name}' is {sizes[0]} in one adapter and {sizes[1]} in the other: they were made for "
            "different base models."
        )
    rows, columns = first.rows.T @ second.rows, first.columns.T @ second.columns  # (r_i, r_j)
    out, inside = sizes[0]
    ranks = first.core.shape[0], second.core.shape[0]
    # projected onto the other's subspaces: P_Bi D_j P_Ai = Q_Bi (columns core_j rows^T) Q_Ai^T
    of_second = columns @ second.core @ rows.T
    of_first = columns.T @ first.core @ rows
    norms = first.norm, second.norm
    return LayerOverlap(
        inputs=_share(rows, ranks),
        outputs=_share(columns, ranks),
        shared=0.5 * (_ratio(of_second, norms[1]) + _ratio(of_first, norms[0])),
        chance=0.5 * sum(min(1.0, rank / inside) * min(1.0, rank / out) for rank in ranks),
        cosine=float((of_second * first.core).sum()) / (norms[0] * norms[1]),
        first=norms[0],
        second=norms[1],
    )


def _share(product: Tensor, ranks: tuple[int, int]) -> float:
    return min(1.0, float(product.square().sum()) / min(ranks))


def _ratio(part: Tensor, norm: float) -> float:
    return min(1.0, float(part.square().sum()) / norm**2)


def _energy(parts: Mapping[str, Update]) -> float:
    return sum(part.norm**2 for part in parts.values())
