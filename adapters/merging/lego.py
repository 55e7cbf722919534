"""LoRA-LEGO: Merging LoRAs like Playing LEGO, arXiv 2409.16167 (ICLR 2025).

Per module: every LoRA is split into its rank-1 units u_j = [A_j, B_j^T] (scale folded in as sqrt(s) on both sides), the
N units of all LoRAs are clustered by k-means, and the centroids become the ranks of a new LoRA.

    mu_j <- mu_j mean_{u in C_j} |u| / |mu_j|        a mean is shorter than its members (parameter reweighting)
    delta <- sqrt(r_ref / k) delta                   the variance grows with the ranks summed (output reweighting)

r_ref is the LoRAs' rank (the rounded mean if they differ); k is free, by default r_ref. With one LoRA it prunes. The
result is an ordinary LoRA with scale 1. Units are sorted first, so the order of ranks and adapters does not matter;
the random initialisation of k-means has its own seed.

The two factors could not be checked against the paper's text; they agree with two independent implementations. A unit's
size can move between A and B without changing the update, but k-means sees it: ``balance`` first makes both halves
equally long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.formats.lora import LoraFile, LoraLayer, group_dict, relative_error
from adapters.merging.concatenate import Merged, join, summands

METHOD = Method(
    name="lego",
    title="LoRA-LEGO",
    summary="Clusters the rank-1 parts of all adapters and keeps the centroids: one LoRA of the rank you choose.",
    stage="merging",
    makes="ordinary LoRA",
    paper="LoRA-LEGO, arXiv 2409.16167",
    entry="adapters.merging.lego:lego",
)

Norm = Literal["inf", "l2", "none"]
RESTARTS, ITERATIONS, TOLERANCE = 10, 300, 1e-4


def lego(
    files: Sequence[LoraFile],
    weights: Sequence[Mapping[str, float] | float],
    rank: int | None = None,
    seed: int = 0,
    features: Literal["raw", "unit_halves"] = "raw",
    parameter_norm: Norm = "inf",
    output_reweight: bool = True,
    balance: bool = False,
) -> Merged:
    """Merge LoRAs (or prune one) by clustering their ranks.

    Args:
        files: adapters with the module paths of one model (fitted).
        weights: as for :func:`adapters.merging.concatenate.concatenate`.
        rank: k; None = the adapters' rank, or its rounded mean if they differ.
        seed: of the k-means initialisation.
        features: cluster units as they are, or with each half scaled to length 1.
        parameter_norm: the norm that is restored to the mean over a centroid's members.
        output_reweight: multiply the update by sqrt(r_ref / k).
        balance: make both halves of each unit equally long first (the update stays the same).

    Returns:
        The LoRA; ``errors`` per layer is the relative distance to the exact sum, ``report`` the clusters.

    Raises:
        InputError: nothing to merge, k out of range, or an unknown option.
    """
    if features not in ("raw", "unit_halves"):
        raise InputError(f"LEGO clusters features 'raw' or 'unit_halves', not '{features}'.")
    if parameter_norm not in ("inf", "l2", "none"):
        raise InputError(f"LEGO's parameter_norm is 'inf', 'l2' or 'none', not '{parameter_norm}'.")
    gathered = summands(files, weights)
    most = max(sum(layer.rank for layer, _ in parts) for parts in gathered.values())
    if rank is not None and not 1 <= rank <= most:
        raise InputError(f"LEGO's rank must be from 1 to {most}, the sum of the adapters' ranks, got {rank}.")
    layers: dict[tuple[str, str], LoraLayer] = {}
    errors: dict[str, float] = {}
    report: dict[str, dict[str, Any]] = {}
    for (component, module), parts in gathered.items():
        name = f"{component}.{module}"
        merged, report[name] = merge_layer(parts, rank, seed, features, parameter_norm, output_reweight, balance)
        errors[name] = relative_error(merged.delta(), join(parts).delta())
        layers[component, module] = merged
    return Merged(LoraFile(group_dict(layers)), errors, report)


def merge_layer(
    parts: Sequence[tuple[LoraLayer, float]],
    rank: int | None,
    seed: int = 0,
    features: str = "raw",
    parameter_norm: str = "inf",
    output_reweight: bool = True,
    balance: bool = False,
) -> tuple[LoraLayer, dict[str, Any]]:
    """One module's weighted LoRAs merged to rank k, and facts about the clusters by name (see :func:`lego`)."""
    reference = round(sum(layer.rank for layer, _ in parts) / len(parts))
    k = reference if rank is None else rank
    units, owners, width = _units(parts)
    if balance:
        units = _balanced(units, width)
    total = units.shape[0]
    # sorted, so that the seeding depends on the units only
    order = torch.tensor(sorted(range(total), key=lambda i: units[i].tolist()))
    units, owners = units[order], owners[order]
    if total <= k:
        labels, centres, inertia = torch.arange(total), units.clone(), 0.0
    else:
        seen = _unit_halves(units, width) if features == "unit_halves" else units
        labels, inertia = kmeans(seen, k, seed)
        centres = torch.stack([units[labels == j].mean(0) for j in range(k)])
    if parameter_norm != "none":
        ord_ = float("inf") if parameter_norm == "inf" else 2.0
        sizes = torch.linalg.vector_norm(units, ord_, dim=1)
        for j in range(centres.shape[0]):
            length = torch.linalg.vector_norm(centres[j], ord_)
            if length > 0:
                centres[j] *= sizes[labels == j].mean() / length
    factor = (reference / k) ** 0.5 if output_reweight else 1.0
    first = parts[0][0]
    A, B = centres[:, :width].float(), factor * centres[:, width:].T.float()
    layer = LoraLayer(
        A.reshape(-1, *first.A.shape[1:]).contiguous(),
        B.reshape(B.shape[0], -1, *first.B.shape[2:]).contiguous(),
        alpha=float(A.shape[0]),
        embedding=first.embedding,
    )
    clusters = [owners[labels == j] for j in range(centres.shape[0])]
    return layer, {
        "sizes": [len(cluster) for cluster in clusters],
        "adapters_mixed": [len(set(cluster.tolist())) for cluster in clusters],
        "inertia": inertia,
        "output_factor": factor,
        "half_ratio": float(units[:, :width].norm() / units[:, width:].norm().clamp_min(1e-30)),
    }


def kmeans(points: Tensor, k: int, seed: int = 0) -> tuple[Tensor, float]:
    """Labels (N,) and inertia of the best of :data:`RESTARTS` k-means++ runs on points (N, d); no cluster is empty."""
    generator = torch.Generator().manual_seed(seed)
    best: tuple[Tensor, float] | None = None
    spread = float(points.var(0, unbiased=False).mean())
    for _ in range(RESTARTS):
        centres = _seeds(points, k, generator)
        for _ in range(ITERATIONS):
            labels = _assign(points, centres)
            moved = torch.stack([points[labels == j].mean(0) for j in range(k)])
            shift = float((moved - centres).square().sum())
            centres = moved
            if shift <= TOLERANCE * spread:
                break
        labels = _assign(points, centres)
        inertia = float((points - centres[labels]).square().sum())
        if best is None or inertia < best[1] - 1e-12:
            best = labels, inertia
    assert best is not None
    return best


def _assign(points: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of every point; an empty cluster takes the point farthest from its centre."""
    squared = torch.cdist(points, centres).square()
    distance, labels = squared.min(1)
    for j in range(centres.shape[0]):
        if not bool((labels == j).any()):
            counts = torch.bincount(labels, minlength=centres.shape[0])
            free = torch.where(counts[labels] > 1, distance, torch.full_like(distance, -1.0))
            taken = int(free.argmax())
            labels[taken], distance[taken] = j, 0.0
    return labels


def _seeds(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is a point drawn in proportion to its squared distance from the previous ones."""
    chosen = [int(torch.randint(points.shape[0], (1,), generator=generator))]
    for _ in range(k - 1):
        nearest = torch.cdist(points, points[chosen]).square().min(1).values
        nearest[chosen] = 0
        if not float(nearest.sum()) > 0:  # only copies are left
            nearest = torch.ones_like(nearest)
            nearest[chosen] = 0
        chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
    return points[chosen]


def _units(parts: Sequence[tuple[LoraLayer, float]]) -> tuple[Tensor, Tensor, int]:
    """Units (N, in + out) in fp64, the adapter of each (N,), and the length of the A half."""
    rows, owners = [], []
    for number, (layer, weight) in enumerate(parts):
        strength = layer.scale * weight
        root = abs(strength) ** 0.5
        A, B = layer.A.double().flatten(1), layer.B.double().flatten(1)
        rows.append(torch.cat([root * A, (root if strength >= 0 else -root) * B.T], dim=1).cpu())
        owners += [number] * layer.rank
    return torch.cat(rows), torch.tensor(owners), parts[0][0].A[0].numel()


def _balanced(units: Tensor, width: int) -> Tensor:
    """Units with both halves at the geometric mean of their lengths, and the largest entry of the A half positive."""
    a, b = units[:, :width], units[:, width:]
    one, two = (torch.linalg.vector_norm(half, dim=1, keepdim=True).clamp_min(1e-30) for half in (a, b))
    sign = a.gather(1, a.abs().argmax(1, keepdim=True)).sign()
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    return torch.cat([sign * a * (two / one).sqrt(), sign * b * (one / two).sqrt()], dim=1)


def _unit_halves(units: Tensor, width: int) -> Tensor:
    halves = (units[:, :width], units[:, width:])
    return torch.cat(
        [half / torch.linalg.vector_norm(half, dim=1, keepdim=True).clamp_min(1e-30) for half in halves], 1
    )
