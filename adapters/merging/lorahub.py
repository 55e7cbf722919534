"""LoraHub: weights of a merge, found by gradient-free search on a few examples.

"LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition" (arXiv 2307.13269). Weights w in
[-1.5, 1.5]^N minimise

    loss(w) + 0.05 mean_i |w_i|

where ``loss`` is the loss of the model with the merged adapter on a few examples. Two ways of merging:

    exact      sum_i w_i s_i B_i A_i                              (concatenation)
    factors    (sum_i w_i B_i) (sum_i w_i A_i), at one scale      (the authors' code; has cross terms B_i A_j)

The search is COBYQA (a derivative-free trust-region method, scipy) instead of the authors' nevergrad.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.formats.lora import LoraFile, LoraLayer, group_dict
from adapters.merging.concatenate import concatenate
from adapters.merging.np_lora import same_targets
from adapters.progress import Monitor, Progress, Silent, check

METHOD = Method(
    name="lorahub",
    title="LoraHub",
    summary="Searches the weights of a merge on a few examples, without gradients (Python only: it needs your loss).",
    stage="merging",
    makes="ordinary LoRA",
    paper="LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition, arXiv 2307.13269",
    entry="adapters.merging.lorahub:search",
    status="Python only: it needs your own evaluation",
)

BOUND = 1.5
PENALTY = 0.05

Loss = Callable[[LoraFile], float]
"""The loss of the model with a merged adapter, on a few examples."""


@dataclass(frozen=True, eq=False)
class Found:
    """Result of the search.

    Attributes:
        weights: the best ones, one per adapter.
        loss: the loss with them, without the penalty.
        start: the loss without adapters (all weights 0).
        file: the adapter merged with the best weights.
        tried: number of evaluations.
    """

    weights: tuple[float, ...]
    loss: float
    start: float
    file: LoraFile
    tried: int


def search(
    files: Sequence[LoraFile],
    loss: Loss,
    steps: int = 40,
    mode: Literal["exact", "factors"] = "exact",
    penalty: float = PENALTY,
    monitor: Monitor | None = None,
) -> Found:
    """The weights with the smallest penalised loss.

    Args:
        files: adapters of one model.
        loss: evaluates a merged adapter; called at most ``steps`` times.
        steps: number of evaluations, at least ``len(files) + 2``.
        mode: how adapters are merged.
        penalty: factor of the mean absolute weight.
        monitor: receives progress per evaluation and may cancel.

    Raises:
        InputError: no adapter, too few steps, a loss that is NaN, or adapters that cannot be merged.
        Cancelled: the monitor asked to stop.
    """
    if not files:
        raise InputError("There is no adapter to search weights for.")
    if steps < len(files) + 2:
        raise InputError(f"The search over {len(files)} weights takes at least {len(files) + 2} steps, got {steps}.")
    monitor = monitor or Silent()
    tried: list[tuple[float, float, tuple[float, ...]]] = []  # penalised loss, loss, weights

    def attempt(values: np.ndarray) -> float:
        check(monitor)
        weights = tuple(float(value) for value in np.clip(values, -BOUND, BOUND))
        value = float(loss(merged(files, weights, mode)))
        if math.isnan(value):
            raise InputError(f"The loss of the weights {', '.join(f'{w:.2f}' for w in weights)} is not a number.")
        total = value + penalty * float(np.abs(weights).mean())
        tried.append((total, value, weights))
        monitor.report(Progress("searching", len(tried), steps, loss=min(entry[0] for entry in tried)))
        return total

    zero = np.zeros(len(files))
    attempt(zero)
    minimize(
        attempt, zero, method="COBYQA", bounds=[(-BOUND, BOUND)] * len(files),
        options={"maxfev": steps - 1, "initial_tr_radius": 0.5},
    )  # fmt: skip
    _, best, weights = min(tried)
    return Found(weights, best, tried[0][1], merged(files, weights, mode), len(tried))


def merged(
    files: Sequence[LoraFile], weights: Sequence[float], mode: Literal["exact", "factors"] = "exact"
) -> LoraFile:
    """The adapters merged with these weights; if all are 0, an adapter that changes nothing.

    Raises:
        InputError: nothing to merge, or with ``factors`` layers, ranks or scales that differ.
    """
    if mode == "factors":
        return _factors(files, weights)
    if all(weight == 0 for weight in weights):
        return _factors(files[:1], [0.0])
    return concatenate(files, list(weights)).file


def _factors(files: Sequence[LoraFile], weights: Sequence[float]) -> LoraFile:
    first = files[0]
    for file in files[1:]:
        same_targets(first, file, "LoraHub (factors)")
    layers: dict[tuple[str, str], LoraLayer] = {}
    for component, module, layer in first.layers():
        others = [file.parts[component][module] for file in files]
        if any(other.A.shape != layer.A.shape or other.scale != layer.scale for other in others):
            raise InputError(f"LoraHub (factors) needs the same rank and alpha; they differ in '{component}.{module}'.")
        A = sum((weight * other.A.float() for weight, other in zip(weights, others, strict=True)), 0 * layer.A.float())
        B = sum((weight * other.B.float() for weight, other in zip(weights, others, strict=True)), 0 * layer.B.float())
        layers[component, module] = LoraLayer(A, B, layer.alpha, layer.rslora, embedding=layer.embedding)
    return LoraFile(group_dict(layers))
