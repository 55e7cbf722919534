"""How well probabilities tell two labels apart, with what a rare class needs besides accuracy (by scikit-learn)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from adapters.errors import MissingDependencyError

Measures = dict[str, float]


def measures(truth: Any, probability: Any, threshold: float = 0.5) -> Measures:
    """Accuracy, balanced accuracy, macro F1, MCC, areas under ROC and precision-recall curves.

    Args:
        truth: 0 or 1 (n,).
        probability: of label 1 (n,). Areas are left out when only one label is there.
    """
    known, shown = np.asarray(truth), np.asarray(probability, dtype=float)
    guess = (shown >= threshold).astype(int)
    found = {
        "accuracy": float((guess == known).mean()),
        "balanced_accuracy": float(np.mean([(guess[known == k] == k).mean() for k in (0, 1) if (known == k).any()])),
        "macro_f1": float(np.mean(_each(known, guess)[2])),
        "mcc": mcc(known, guess),
    }
    if len(set(known.tolist())) == 2:
        found |= {"roc_auc": area(known, shown), "pr_auc": float(_metrics().average_precision_score(known, shown))}
    return found


def by_label(truth: Any, probability: Any, threshold: float = 0.5) -> list[Measures]:
    """Precision, recall and F1 of label 0 and of label 1."""
    known, shown = np.asarray(truth), np.asarray(probability, dtype=float)
    each = _each(known, (shown >= threshold).astype(int))
    return [{name: float(each[n][k]) for n, name in enumerate(("precision", "recall", "f1"))} for k in (0, 1)]


def mcc(truth: np.ndarray, guess: np.ndarray) -> float:
    """Matthews' correlation (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)); 0 if a factor is 0."""
    tp, tn, fp, fn = (int(((guess == g) & (truth == t)).sum()) for g, t in ((1, 1), (0, 0), (1, 0), (0, 1)))
    factors = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return float((tp * tn - fp * fn) / math.sqrt(factors)) if factors else 0.0


def _each(truth: np.ndarray, guess: np.ndarray) -> Any:
    return _metrics().precision_recall_fscore_support(truth, guess, labels=[0, 1], zero_division=0.0)


def area(truth: Any, score: Any) -> float:
    """Area under the ROC curve of any score."""
    return float(_metrics().roc_auc_score(truth, score))


def interval(
    truth: Any, score: Any, measure: Callable[[Any, Any], float] = area, rounds: int = 1000,
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


def by_length(truth: Any, probability: Any, lengths: Any, threshold: float = 0.5) -> list[tuple[int, int, Measures]]:
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
