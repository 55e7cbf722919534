"""How well probabilities tell two labels apart, with what a rare class needs besides accuracy (by scikit-learn)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from adapters.errors import MissingDependencyError

Measures = dict[str, float]


def measures(truth: Any, probability: Any, threshold: float = 0.5) -> Measures:
    """Accuracy, balanced accuracy, macro F1, MCC, areas under ROC and precision-recall curves; precision, recall and F1
    of both labels as ``precision_0`` ... ``f1_1``.

    Args:
        truth: 0 or 1 (n,).
        probability: of label 1 (n,). Areas are left out when only one label is there.
    """
    known, shown = np.asarray(truth), np.asarray(probability, dtype=float)
    guess = (shown >= threshold).astype(int)
    m = _metrics()
    each = m.precision_recall_fscore_support(known, guess, labels=[0, 1], zero_division=0.0)
    found = {
        "accuracy": m.accuracy_score(known, guess),
        "balanced_accuracy": float(np.mean([(guess[known == k] == k).mean() for k in (0, 1) if (known == k).any()])),
        "macro_f1": m.f1_score(known, guess, average="macro", labels=[0, 1], zero_division=0.0),
        "mcc": m.matthews_corrcoef(known, guess),
    }
    if len(set(known.tolist())) == 2:
        found |= {"roc_auc": m.roc_auc_score(known, shown), "pr_auc": m.average_precision_score(known, shown)}
    names = ("precision", "recall", "f1")
    found |= {f"{name}_{k}": each[number][k] for number, name in enumerate(names) for k in (0, 1)}
    return {name: float(value) for name, value in found.items()}


def area(truth: Sequence[int], score: Sequence[float]) -> float:
    """Area under the ROC curve of any score."""
    return float(_metrics().roc_auc_score(truth, score))


def interval(
    truth: Sequence[int], score: Sequence[float], measure: Callable[[Any, Any], float] = area, rounds: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """The bootstrap 95 % interval of a measure: its percentiles over transcripts drawn with replacement."""
    known, shown, draws = np.asarray(truth), np.asarray(score), np.random.default_rng(seed)
    found = []
    for _ in range(rounds):
        rows = draws.integers(len(known), size=len(known))
        if len(set(known[rows].tolist())) == 2:
            found.append(measure(known[rows], shown[rows]))
    return float(np.percentile(found, 2.5)), float(np.percentile(found, 97.5))


def by_length(
    truth: Sequence[int], probability: Sequence[float], lengths: Sequence[int], threshold: float = 0.5
) -> list[tuple[int, int, Measures]]:
    """(shortest, longest, measures) of every quarter of the transcripts by length."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    known, shown, sizes = (np.asarray(values) for values in (truth, probability, lengths))
    return [
        (int(sizes[part[0]]), int(sizes[part[-1]]), measures(known[part], shown[part], threshold))
        for part in np.array_split(order, 4) if len(part)
    ]  # fmt: skip


def _metrics() -> Any:
    try:
        import sklearn.metrics
    except ImportError:
        raise MissingDependencyError("scikit-learn", "genomics", "Measuring a classifier") from None
    return sklearn.metrics
