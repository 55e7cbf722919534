"""Scores transcripts: logits of every reading of a transcript, their mean, and the probability of the second label.

A transcript is read as a whole, as its longest ORF, or both (:data:`~pipelines.genomics.task_file.View`); a reading
that does not fit one input is cut, or becomes overlapping windows. The margin of a reading is its mean logit of the
second label minus that of the first; with both readings, their mean; p = 1 / (1 + exp(-margin)). Every batch has its
attention mask, so a score does not depend on what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from pipelines.genomics.fasta import Record
from pipelines.genomics.kmers import Kmers
from pipelines.genomics.orf import Orf, longest_orf
from pipelines.genomics.task_file import Long, RnaTask, View

OVERLAP = 256
"""Nucleotides that neighbouring windows share, at most a quarter of a window."""

TOKENS = 8192
"""Most tokens of a batch, padding included."""

CHUNK = 512
"""Transcripts that are held in memory, sorted by length and scored together."""


@dataclass(frozen=True)
class Score:
    """What a classifier says of one transcript.

    Attributes:
        full, orf: margins of the readings; None for one that was not asked or is not there.
        frame: its longest ORF, if there is one.
        gc: share of G and C.
        cut: a reading was longer than the model reads.
    """

    record: Record
    full: float | None
    orf: float | None
    frame: Orf | None
    gc: float
    cut: bool

    @property
    def margin(self) -> float | None:
        """Mean margin of its readings; None if it has none."""
        known = [value for value in (self.full, self.orf) if value is not None]
        return sum(known) / len(known) if known else None

    @property
    def probability(self) -> float | None:
        """Of the second label; None without a reading, or if the model's answer is no number."""
        margin = self.margin
        if margin is None or math.isnan(margin):
            return None
        return 1 / (1 + math.exp(-margin)) if margin > -700 else 0.0

    @property
    def coverage(self) -> float:
        """Share of the transcript that its longest ORF covers."""
        return len(self.frame) / len(self.record.sequence) if self.frame else 0.0


def readings(sequence: str, frame: Orf | None, view: View) -> list[tuple[str, str]]:
    """(name, nucleotides) of what is read of a transcript; an ORF that is not there is not read."""
    found = [("full", sequence)] if view != "orf" else []
    if view != "full" and frame is not None:
        found.append(("orf", frame.of(sequence)))
    return found


def windows(kmers: Kmers, sequence: str, long: Long) -> list[list[int]]:
    """The inputs for one reading: its first part, or windows that overlap by :data:`OVERLAP`; the last ends where the
    reading ends."""
    reach = kmers.reach
    if long == "prefix" or len(sequence) <= reach:
        return [kmers.encode(sequence)]
    step = max(1, reach - min(OVERLAP, reach // 4)) // kmers.stride * kmers.stride or kmers.stride
    last = len(sequence) - reach
    starts = [*range(0, last, step), last]
    return [kmers.encode(sequence[start : start + reach]) for start in starts]


@torch.no_grad()
def logits(
    model: Any, inputs: Sequence[Sequence[int]], pad: int, most: int = TOKENS, autocast: Any = nullcontext
) -> np.ndarray:
    """Logits (inputs, labels) in fp32, in the order of ``inputs``; similar lengths are put together, ``most`` tokens at
    a time."""
    order = sorted(range(len(inputs)), key=lambda number: len(inputs[number]))
    device, parts, batch = next(model.parameters()).device, [], list[int]()
    for number in order:
        if batch and len(inputs[number]) * (len(batch) + 1) > most:
            parts.append(_one(model, [inputs[n] for n in batch], pad, device, autocast))
            batch = []
        batch.append(number)
    if batch:
        parts.append(_one(model, [inputs[n] for n in batch], pad, device, autocast))
    found = np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.float32)
    made = np.empty_like(found)
    made[order] = found
    return made


def _one(model: Any, rows: Sequence[Sequence[int]], pad: int, device: torch.device, autocast: Any) -> np.ndarray:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    with autocast():
        found = model(input_ids=ids, attention_mask=mask).logits
    values: np.ndarray = found.float().cpu().numpy()
    return values


def score(
    model: Any, kmers: Kmers, task: RnaTask, records: Sequence[Record], most: int = TOKENS, autocast: Any = nullcontext
) -> list[Score]:
    """Scores of some transcripts, in their order."""
    frames = [longest_orf(record.sequence, task.strands) for record in records]
    inputs: list[list[int]] = []
    places: list[tuple[int, str]] = []
    cut = [False] * len(records)
    for number, (record, frame) in enumerate(zip(records, frames, strict=True)):
        for name, sequence in readings(record.sequence, frame, task.view):
            cut[number] |= len(sequence) > kmers.reach
            made = windows(kmers, sequence, task.long)
            inputs += made
            places += [(number, name)] * len(made)
    margins: dict[tuple[int, str], list[float]] = {}
    values = logits(model, inputs, kmers.number("[PAD]"), most, autocast)
    for place, (first, second) in zip(places, values.tolist(), strict=True):
        margins.setdefault(place, []).append(second - first)

    def mean(number: int, name: str) -> float | None:
        found = margins.get((number, name))
        return sum(found) / len(found) if found else None

    return [
        Score(record, mean(number, "full"), mean(number, "orf"), frames[number], gc_share(record.sequence), cut[number])
        for number, record in enumerate(records)
    ]


def stream(
    model: Any, kmers: Kmers, task: RnaTask, records: Iterable[Record], most: int = TOKENS, chunk: int = CHUNK,
    autocast: Any = nullcontext,
) -> Iterator[Score]:  # fmt: skip
    """Scores of any number of transcripts, in their order, in the memory of ``chunk`` of them."""
    given = iter(records)
    while held := list(islice(given, chunk)):
        yield from score(model, kmers, task, held, most, autocast)


def gc_share(sequence: str) -> float:
    """Share of G and C among the letters."""
    return (sequence.count("G") + sequence.count("C")) / max(1, len(sequence))
