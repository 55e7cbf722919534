"""Classification: a model learns to predict labels; its new head is saved with the adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from studio.training.language.about import About
from studio.training.language.measure import measure
from studio.training.task import Measures
from studio.training.tasks.language import LanguageTask

LANGUAGE = About(
    "classification", "predict a label", "studio.training.tasks.classification:ClassificationTask",
    rows="studio.training.language.rows:labelled",
)  # fmt: skip


class ClassificationTask(LanguageTask):
    """The loss is the cross-entropy of the labels, one per text."""

    opens = "classification"
    peft_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    pipeline_tag = "text-classification"
    one_label = True

    def measure(self) -> Measures:
        autocast = self.session.accelerator.autocast
        found, pairs = measure(self._model, self.held_out(), keep=True, autocast=autocast)
        return {**found, "macro_f1": macro_f1(pairs)}

    def answer(self, prompts: Sequence[str]) -> Iterator[str]:
        for text in prompts:
            shares = self.logits(text)[1].float().softmax(-1)
            yield f"{self.read.labels[int(shares.argmax())]} ({float(shares.max()):.0%})"


def macro_f1(pairs: Iterable[tuple[int, int]]) -> float:
    """Mean over the true classes of F1 = 2 TP / (2 TP + FP + FN), from (prediction, truth) pairs."""
    known = list(pairs)
    scores = []
    for label in sorted({truth for _, truth in known}):
        hits = sum(guess == truth == label for guess, truth in known)
        wrong = sum((guess == label) != (truth == label) for guess, truth in known)
        scores.append(2 * hits / (2 * hits + wrong))
    return sum(scores) / len(scores) if scores else 0.0
