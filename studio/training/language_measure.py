"""Measuring a language model on rows it does not learn from: loss, perplexity, accuracy, macro F1."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from studio.datasets.encoding import IGNORED
from studio.training.language_data import Batch

Measures = dict[str, float]


@torch.no_grad()
def measure(model: nn.Module, batches: Iterable[Batch], task: str, autocast: Any = nullcontext) -> Measures:
    """Means over all labels of ``batches``.

    Returns:
        ``validation_loss`` and ``accuracy`` (share of labels whose likeliest answer is right); ``perplexity`` =
        exp(loss) for texts; ``macro_f1`` for classification.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    loss, right, count = 0.0, 0, 0
    pairs: list[tuple[int, int]] = []
    device = next(model.parameters()).device
    try:
        for batch in batches:
            given = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            labels = batch["labels"].to(device)
            with autocast():
                logits = model(**given).logits
            if task == "causal":
                logits, labels = logits[:, :-1], labels[:, 1:]
            valid = labels != IGNORED
            logits, labels = logits[valid].float(), labels[valid]
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            guesses = logits.argmax(-1)
            right += int((guesses == labels).sum())
            count += len(labels)
            if task == "classification":
                pairs += list(zip(guesses.tolist(), labels.tolist(), strict=True))
    finally:
        for module, training in modes.items():
            module.training = training
    mean = loss / max(1, count)
    found = {"validation_loss": mean, "accuracy": right / max(1, count)}
    if task == "classification":
        return {**found, "macro_f1": macro_f1(pairs)}
    return {**found, "perplexity": math.exp(min(mean, 700.0))}


def macro_f1(pairs: Iterable[tuple[int, int]]) -> float:
    """Mean over the true classes of F1 = 2 TP / (2 TP + FP + FN), from (guess, truth) pairs."""
    known = list(pairs)
    scores = []
    for label in sorted({truth for _, truth in known}):
        hits = sum(guess == truth == label for guess, truth in known)
        wrong = sum((guess == label) != (truth == label) for guess, truth in known)
        scores.append(2 * hits / (2 * hits + wrong))
    return sum(scores) / len(scores) if scores else 0.0
