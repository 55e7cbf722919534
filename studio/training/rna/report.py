"""The report on held-out transcripts: a classifier beside what the lengths alone tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.genomics import metrics
from pipelines.genomics.scoring import Score
from studio.training.task import Measures


@dataclass(frozen=True)
class Judged:
    """Held-out transcripts with their labels and scores; those without a probability are left out.

    Attributes:
        unread: how many those are.
    """

    truth: np.ndarray
    probability: np.ndarray
    lengths: np.ndarray
    orfs: np.ndarray
    unread: int = 0

    @classmethod
    def of(cls, scores: Sequence[Score], truth: Sequence[int]) -> Judged:
        """Scores beside the labels of their transcripts."""
        kept = [(score, label) for score, label in zip(scores, truth, strict=True) if score.probability is not None]
        return cls(
            np.array([label for _, label in kept]), np.array([score.probability for score, _ in kept]),
            np.array([len(score.record.sequence) for score, _ in kept]),
            np.array([len(score.frame) if score.frame else 0 for score, _ in kept]), len(scores) - len(kept),
        )  # fmt: skip

    def loss(self) -> float:
        """Mean cross-entropy of the probabilities."""
        right = np.where(self.truth == 1, self.probability, 1 - self.probability)
        return float(-np.log(np.clip(right, 1e-12, None)).mean())

    def measures(self, threshold: float) -> Measures:
        """Measures of the classifier, and the areas that length and ORF length alone reach: the second label's are
        taken as shorter, as lncRNAs are, and a model must beat them to be of use. Empty if no transcript was read."""
        if not len(self.truth):
            return {}
        found = {"validation_loss": self.loss(), **metrics.measures(self.truth, self.probability, threshold)}
        if "roc_auc" in found:
            found |= {"roc_auc_of_length": metrics.area(self.truth, -self.lengths),
                      "roc_auc_of_orf_length": metrics.area(self.truth, -self.orfs)}  # fmt: skip
        return found

    def report(self, labels: Sequence[str], threshold: float, seed: int) -> dict[str, Any]:
        """Measures with the bootstrap 95 % interval of the area, and by quarters of length; None if none was read."""
        told = {"labels": list(labels), "transcripts": len(self.truth), "not_read": self.unread, "threshold": threshold}
        if not len(self.truth):
            return {**told, "measures": None, "by_label": None, "by_length": None}
        quarters = metrics.by_length(self.truth, self.probability, self.lengths, threshold)
        found: dict[str, Any] = {
            **told, "measures": self.measures(threshold),
            "by_label": dict(zip(labels, metrics.by_label(self.truth, self.probability, threshold), strict=True)),
            "by_length": [{"from": low, "to": high, **measured} for low, high, measured in quarters],
        }  # fmt: skip
        if len(set(self.truth.tolist())) == 2:
            found["roc_auc_95"] = metrics.interval(self.truth, self.probability, seed=seed)
        return found
