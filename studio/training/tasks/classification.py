"""Classification: a model learns to tell labels apart; its new head is saved with the adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from adapters.errors import InputError
from studio.datasets.conversations import Columns, Text, labelled_texts
from studio.datasets.texts import TextReport
from studio.training.language.about import About
from studio.training.language.data import Items, Rows
from studio.training.language.measure import measure
from studio.training.task import Measures
from studio.training.tasks.language import LanguageTask

LANGUAGE = About("classification", "predict a label", "studio.training.tasks.classification:ClassificationTask")


class ClassificationTask(LanguageTask):
    """The loss is the cross-entropy of the labels, one per text."""

    opens = "classification"
    peft_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    pipeline_tag = "text-classification"
    one_label = True

    def understand(self, report: TextReport, columns: Columns) -> Items:
        return list(labelled_texts(report, columns, self.config.skip_broken))

    def rows(self) -> None:
        super().rows()
        self.read.labels = labels_of(self.read, self.config.data)

    def measure(self) -> Measures:
        autocast = self.session.accelerator.autocast
        found, pairs = measure(self._model, self.held_out(), keep=True, autocast=autocast)
        return {**found, "macro_f1": macro_f1(pairs)}

    def answer(self, prompts: Sequence[str]) -> Iterator[str]:
        for text in prompts:
            shares = self.logits(text)[1].float().softmax(-1)
            yield f"{self.read.labels[int(shares.argmax())]} ({float(shares.max()):.0%})"


def labels_of(rows: Rows, source: str) -> list[str]:
    """The classes, sorted.

    Raises:
        InputError: only one, or rows held out with another label.
    """
    labels = sorted({str(item.label) for item in rows.shown if isinstance(item, Text)})
    if len(labels) < 2:
        raise InputError(f"'{source}' has one label only ('{labels[0]}'): classification needs at least two.")
    strange = sorted({str(item.label) for item in rows.held_out if isinstance(item, Text)} - set(labels))
    if strange:
        raise InputError(f"The label '{strange[0]}' is in the rows to measure with, but in none to learn from.")
    return labels


def macro_f1(pairs: Iterable[tuple[int, int]]) -> float:
    """Mean over the true classes of F1 = 2 TP / (2 TP + FP + FN), from (guess, truth) pairs."""
    known = list(pairs)
    scores = []
    for label in sorted({truth for _, truth in known}):
        hits = sum(guess == truth == label for guess, truth in known)
        wrong = sum((guess == label) != (truth == label) for guess, truth in known)
        scores.append(2 * hits / (2 * hits + wrong))
    return sum(scores) / len(scores) if scores else 0.0
