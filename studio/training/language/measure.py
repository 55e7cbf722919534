"""Measures a language model on held-out rows: loss, accuracy, perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from studio.datasets.encoding import IGNORED
from studio.training.language.data import Batch

Measures = dict[str, float]
Pairs = list[tuple[int, int]]


@torch.no_grad()
def measure(
    model: nn.Module, batches: Iterable[Batch], shifted: bool = False, keep: bool = False, autocast: Any = nullcontext
) -> tuple[Measures, Pairs]:
    """Means over all labels of ``batches``.

    Args:
        shifted: logit t belongs to label t + 1 (causal language models).
        keep: collect the predictions.

    Returns:
        ``validation_loss`` and ``accuracy`` (share of labels whose likeliest answer is right), and (prediction, truth)
        pairs if ``keep``.
    """
    loss, right, count = 0.0, 0, 0
    pairs: Pairs = []
    device = next(model.parameters()).device
    with resting(model):
        for batch in batches:
            given = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            labels = batch["labels"].to(device)
            with autocast():
                logits = model(**given).logits
            if shifted:
                logits, labels = logits[:, :-1], labels[:, 1:]
            valid = labels != IGNORED
            logits, labels = logits[valid].float(), labels[valid]
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            guesses = logits.argmax(-1)
            right += int((guesses == labels).sum())
            count += len(labels)
            if keep:
                pairs += list(zip(guesses.tolist(), labels.tolist(), strict=True))
    return {"validation_loss": loss / max(1, count), "accuracy": right / max(1, count)}, pairs


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards every part is as before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def with_perplexity(found: Measures) -> Measures:
    """The measures with ``perplexity`` = exp(loss) for texts."""
    return {**found, "perplexity": math.exp(min(found["validation_loss"], 700.0))}
