"""Extract a LoRA from two models: what fine-tuning changed, as the nearest low-rank update.

    D = W_tuned - W_base = U S V^T,    B = U_k S_k^(1/2),  A = S_k^(1/2) V_k^T,    s = 1

By Eckart-Young no update of rank k is nearer; its relative error is sqrt(sum_{i>k} S_i^2) / |D|. The rank is the same
for all layers, or the smallest that keeps a share of a layer's energy, sum_{i<=k} S_i^2 >= share |D|^2. Only linear
layers and convolutions are extracted; whatever else differs (norms, biases, embeddings) is reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.catalogue import Method
from adapters.errors import FamilyError, InputError
from adapters.formats.lora import LoraFile, LoraLayer
from adapters.progress import Monitor, Progress, Silent, check

METHOD = Method(
    name="extract",
    title="Extraction by SVD",
    summary="The difference of two models as an ordinary LoRA, by rank or by share of energy, with each layer's error.",
    stage="generation",
    makes="ordinary LoRA",
    paper="",
    entry="adapters.merging.extract:extract",
)


@dataclass(frozen=True, eq=False)
class Extracted:
    """A LoRA made from two models.

    Attributes:
        file: the LoRA.
        errors: "component.module" -> |D - s B A| / |D|, for every layer of the LoRA.
        left_out: "component.parameter" -> |difference| / |base|, for parameters that differ but are in no layer.
    """

    file: LoraFile
    errors: Mapping[str, float]
    left_out: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest error."""
        return max(self.errors.items(), key=lambda item: item[1])


def extract(
    base: Mapping[str, nn.Module],
    tuned: Mapping[str, nn.Module],
    rank: int | None = None,
    energy: float | None = None,
    monitor: Monitor | None = None,
) -> Extracted:
    """The LoRA that turns ``base`` into ``tuned``, as nearly as its rank allows.

    Args:
        base, tuned: component -> model, with the same modules.
        rank: largest rank of a layer.
        energy: share of each layer's energy to keep, in (0, 1]; if ``rank`` is given too, the smaller rank is used.
        monitor: receives progress per layer and may cancel.

    Raises:
        FamilyError: the models differ in their components, modules or shapes.
        InputError: neither rank nor energy, one out of range, weights that are not finite, or no difference.
        Cancelled: the monitor asked to stop.
    """
    if rank is None and energy is None:
        raise InputError("Choose how much to keep: a rank, or a share of the energy between 0 and 1.")
    if rank is not None and rank < 1:
        raise InputError(f"The rank of an extracted LoRA must be at least 1, got {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"The share of energy to keep must be between 0 and 1, got {energy:g}.")
    monitor = monitor or Silent()
    _check_same(base, tuned)
    parts: dict[str, dict[str, LoraLayer]] = {}
    errors: dict[str, float] = {}
    used: set[str] = set()
    pairs = list(_pairs(base, tuned))
    for number, (component, name, left, right) in enumerate(pairs):
        check(monitor)
        monitor.report(Progress("extracting", number + 1, len(pairs)))
        difference = right.detach().float() - left.detach().float()
        if not bool(torch.isfinite(difference).all()):
            raise InputError(f"The weights of '{component}.{name}' hold NaN or infinite values: nothing to extract.")
        used.add(f"{component}.{name}.weight")
        if not bool(difference.any()):
            continue
        layer, errors[f"{component}.{name}"] = nearest(difference, rank, energy)
        parts.setdefault(component, {})[name] = layer
    if not parts:
        raise InputError("The two models have the same linear layers and convolutions: there is nothing to extract.")
    return Extracted(LoraFile(parts), errors, _left_out(base, tuned, used))


def nearest(difference: Tensor, rank: int | None = None, energy: float | None = None) -> tuple[LoraLayer, float]:
    """The nearest layer to ``difference`` (out, in[, kh, kw]) and its relative error."""
    U, S, Vh = torch.linalg.svd(difference.flatten(1).float(), full_matrices=False)
    squares = S.double().square()
    kept = S.numel() if rank is None else min(rank, S.numel())
    if energy is not None:
        enough = squares.cumsum(0) >= energy * squares.sum() * (1 - 1e-12)
        kept = min(kept, int(enough.to(torch.uint8).argmax()) + 1)
    root = S[:kept].sqrt()
    A, B = root[:, None] * Vh[:kept], U[:, :kept] * root
    lost = float(squares[kept:].sum() / squares.sum())
    ones = (1,) * (difference.ndim - 2)
    layer = LoraLayer(A.reshape(kept, *difference.shape[1:]), B.reshape(*B.shape, *ones), alpha=float(kept))
    return layer, math.sqrt(max(lost, 0.0))


def _pairs(base: Mapping[str, nn.Module], tuned: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(component, module, base weight, tuned weight) of everything a LoRA can change."""
    for component, model in base.items():
        for name, module in model.named_modules():
            if name and (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)):
                other = tuned[component].get_submodule(name)
                assert isinstance(other, nn.Linear | nn.Conv2d)
                yield component, name, module.weight, other.weight


def _check_same(base: Mapping[str, nn.Module], tuned: Mapping[str, nn.Module]) -> None:
    if set(base) != set(tuned):
        raise FamilyError(
            f"The models have different parts ({', '.join(base)} and {', '.join(tuned)}): they belong to two families."
        )
    for component, model in base.items():
        left = {name: tuple(value.shape) for name, value in model.named_parameters()}
        right = {name: tuple(value.shape) for name, value in tuned[component].named_parameters()}
        for name in sorted(left.keys() | right.keys()):
            if left.get(name) != right.get(name):
                raise FamilyError(
                    f"The models do not belong together: '{component}.{name}' is {left.get(name, 'missing')} in the "
                    f"base and {right.get(name, 'missing')} in the other."
                )


def _left_out(base: Mapping[str, nn.Module], tuned: Mapping[str, nn.Module], used: set[str]) -> dict[str, float]:
    found = {}
    for component, model in base.items():
        other = dict(tuned[component].named_parameters())
        for name, value in model.named_parameters():
            left, right = value.detach().float(), other[name].detach().float()
            if f"{component}.{name}" not in used and not torch.equal(left, right):
                size = float(torch.linalg.vector_norm(left))
                found[f"{component}.{name}"] = float(torch.linalg.vector_norm(right - left)) / (size or 1.0)
    return found
