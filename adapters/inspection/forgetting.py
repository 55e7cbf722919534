"""Forgetting: how much an adapter raises a model's loss on old data (arXiv 2410.21228), with controls.

The caller gives functions that measure a loss, each on the same data (same batches, same noise) every time. Adapters
are added to the weights for the measurement; afterwards the weights are restored exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.errors import InputError
from adapters.formats.lora import LoraFile
from adapters.inspection.intruders import Found, shrink, soften, update_norm
from adapters.progress import Monitor, Progress, Silent, check

Measure = Callable[[], float]
"""Measures one loss, always on the same data."""


@dataclass(frozen=True)
class Row:
    """Losses with one variant of the adapter.

    Attributes:
        variant: "base", "adapter", "intruders scaled" or "whole update shrunk".
        strength: lambda, or the factor of the shrunk update.
        norm: |dW| over all layers.
        losses: by name.
    """

    variant: str
    strength: float
    norm: float
    losses: Mapping[str, float]


@contextmanager
@torch.no_grad()
def added(models: Mapping[str, nn.Module], file: LoraFile) -> Iterator[None]:
    """Inside, the adapter is added to the weights; on exit they are restored exactly.

    Raises:
        InputError: the adapter has a layer that the models do not have.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for component, name, layer in file.layers():
            try:
                module = models[component].get_submodule(name)
            except (KeyError, AttributeError):
                raise InputError(f"The base has no '{component}.{name}', which the adapter changes.") from None
            weight: Tensor = module.weight.data  # type: ignore[assignment]
            change = layer.delta()
            change = change.flatten(1).T if isinstance(module, Conv1D | nn.Embedding) else change
            kept.append((weight, weight.clone()))
            weight.copy_((weight.float() + change.reshape(weight.shape).to(weight.device)).to(weight.dtype))
        yield
    finally:
        for weight, before in reversed(kept):
            weight.copy_(before)


def sweep(
    models: Mapping[str, nn.Module],
    file: LoraFile,
    found: Mapping[tuple[str, str], Sequence[Found]],
    measures: Mapping[str, Measure],
    strengths: Sequence[float] = (1.0, 0.75, 0.5, 0.25, 0.0),
    monitor: Monitor | None = None,
) -> list[Row]:
    """Losses of the base, of the adapter with its intruders scaled by each lambda, and of the whole update shrunk to
    the same norm.

    Args:
        models: component -> base model.
        file: the adapter, fitted to the models.
        found: of :func:`adapters.inspection.intruders.inspect`.
        measures: name -> function that measures a loss.
        strengths: values of lambda.
        monitor: receives progress per variant and may cancel between two.

    Raises:
        InputError: a DoRA adapter, a negative lambda, or a layer that the models do not have.
        Cancelled: the monitor asked to stop.
    """
    monitor = monitor or Silent()
    variants: list[tuple[str, float, LoraFile | None]] = [("base", 0.0, None)]
    whole = update_norm(file)
    for strength in strengths:
        softened, _ = soften(file, found, strength)
        variants.append(("adapter" if strength == 1 else "intruders scaled", strength, softened))
        if strength != 1:
            factor = update_norm(softened) / whole if whole else 1.0
            variants.append(("whole update shrunk", factor, shrink(file, factor)))
    rows = []
    for number, (name, value, variant) in enumerate(variants):
        check(monitor)
        monitor.report(Progress("measuring", number, len(variants)))
        with added(models, variant) if variant else nullcontext():
            losses = {key: measure() for key, measure in measures.items()}
        rows.append(Row(name, value, update_norm(variant) if variant else 0.0, losses))
    monitor.report(Progress("measuring", len(variants), len(variants)))
    return rows
