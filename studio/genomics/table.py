"""The table of scores: one tab-separated row per transcript, written as they come and read back to go on."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.genomics.scoring import Score
    from pipelines.genomics.task_file import RnaTask

BINS = 20
"""Bars of the histogram of probabilities."""

DRAWN = 200
"""Rows that are kept in the summary, for a page."""

NO_NUMBER = "the model gives no number"
"""Remark on a transcript for which the model's answer is NaN."""

BEFORE, AFTER = ("id", "length", "label"), (
    "margin_full", "margin_orf", "orf_start", "orf_end", "orf_strand", "orf_frame", "orf_length", "orf_coverage",
    "orf_complete", "gc", "remark",
)  # fmt: skip


def columns(labels: Sequence[str]) -> list[str]:
    """Names of the columns; probabilities are called after their labels."""
    return [*BEFORE, f"p_{labels[1]}", f"p_{labels[0]}", *AFTER]


def row(score: Score, task: RnaTask, threshold: float) -> list[str]:
    """The cells of a transcript; empty ones are not known. ORF places count from 1 on the forward strand."""
    record, frame, share = score.record, score.frame, score.probability
    length = len(record.sequence)
    shown = "" if share is None else f"{share:.6f}"
    other = "" if share is None else f"{1 - float(shown):.6f}"
    orf = [""] * 7
    if frame is not None:
        start, end = frame.place(length)
        orf = [str(start), str(end), frame.strand, str(frame.frame), str(len(frame)), f"{score.coverage:.4f}",
               "yes" if frame.complete else "no"]  # fmt: skip
    label = "" if share is None else task.labels[float(shown) >= threshold]
    remark = "longer than is read" if score.cut and task.long == "prefix" else ""
    if share is None:
        remark = "no ORF to read" if score.margin is None else NO_NUMBER
    return [
        record.id, str(length), label, shown, other, _number(score.full), _number(score.orf), *orf, f"{score.gc:.4f}",
        remark,
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.5f}"


@dataclass
class Summary:
    """What a table says, gathered row by row.

    Attributes:
        labels: names of the two labels; the second is the one of the probabilities.
        rows: how many there are; ``drawn`` holds the first of them.
        counts: rows by label; ``unread`` have none for want of an ORF, ``unknown`` for want of a number.
        histogram: rows by twentieth of the probability.
    """

    labels: Sequence[str]
    rows: int = 0
    unread: int = 0
    unknown: int = 0
    cut: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)
    drawn: list[dict[str, str]] = field(default_factory=list)

    def add(self, cells: Sequence[str]) -> None:
        """Take a row into account."""
        self.rows += 1
        values = dict(zip(columns(self.labels), cells, strict=True))
        if values["label"]:
            self.counts[values["label"]] = self.counts.get(values["label"], 0) + 1
            self.histogram[min(BINS - 1, int(float(cells[3]) * BINS))] += 1
        elif values["remark"] == NO_NUMBER:
            self.unknown += 1
        else:
            self.unread += 1
        self.cut += values["remark"].startswith("longer")
        if len(self.drawn) < DRAWN:
            self.drawn.append(values)

    def remarks(self) -> list[str]:
        """Sentences on what was not read."""
        found = {
            f"{self.cut} transcripts are longer than the model reads: their first part decides": self.cut,
            f"{self.unread} transcripts have no ORF, and no label": self.unread,
            f"{self.unknown} transcripts have no label: {NO_NUMBER}": self.unknown,
        }
        return [sentence for sentence, count in found.items() if count]


def kept(file: Path, labels: Sequence[str]) -> Iterator[list[str]]:
    """The complete rows of a table that was begun; the file is cut behind them.

    A table with other columns, or none, has no rows.
    """
    if not file.is_file():
        return
    whole = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines):
            cells = line.decode("utf-8", "replace").rstrip("\n").split("\t")
            named = columns(labels)
            good = line.endswith(b"\n") and (len(cells) == len(named) if number else cells == named)
            if not good:
                break
            whole += len(line)
            if number:
                yield cells
    with file.open("r+b") as opened:
        opened.truncate(whole)


def read(file: Path, most: int | None = None) -> list[dict[str, Any]]:
    """Rows of a finished table by column."""
    with file.open(encoding="utf-8", newline="") as lines:
        return list(islice(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), most))
