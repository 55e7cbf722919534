"""Transcripts as the rows of a training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipelines.genomics import orf
from pipelines.genomics.fasta import Record
from pipelines.genomics.kmers import Kmers
from pipelines.genomics.scoring import readings, windows
from studio.datasets.encoding import Encoded
from studio.datasets.transcripts import Transcript
from studio.training.schemas.rna import TrainRnaConfig


def inputs(record: Record, kmers: Kmers, config: TrainRnaConfig) -> Iterator[list[int]]:
    """The token rows of one transcript: each reading (an ORF from 100 nt on), each window, and with a stride above 1
    each frame."""
    frame = orf.longest_orf(record.sequence, config.strands)
    if frame is not None and len(frame) < orf.SHORTEST:
        frame = None
    for _, sequence in readings(record.sequence, frame, config.view):
        for offset in range(kmers.stride):
            if len(sequence) - offset >= kmers.k:
                yield from windows(kmers, sequence[offset:], config.long)


def rows(items: Sequence[Transcript], kmers: Kmers, config: TrainRnaConfig) -> tuple[list[Encoded], list[str]]:
    """Every row of every transcript with its label, and sentences on what is not learnt."""
    made: list[Encoded] = []
    cut = without = 0
    for item in items:
        mine = list(inputs(item.record, kmers, config))
        without += not mine
        cut += config.long == "prefix" and len(item.record.sequence) > kmers.reach
        for ids in mine:
            made.append({"input_ids": ids, "labels": [item.label]} if item.label is not None else {"input_ids": ids})
    said = {
        f"{cut} transcripts are longer than the {kmers.reach} nt of one input, the rest of them is not read": cut,
        f"{without} transcripts have no ORF of {orf.SHORTEST} nt and are not learnt": without,
    }
    return made, [sentence for sentence, count in said.items() if count]


def balanced(samples: Sequence[Encoded]) -> list[Encoded]:
    """The samples, those of the rarer label repeated in turn until both labels have as many."""
    by_label: dict[int, list[Encoded]] = {}
    for sample in samples:
        by_label.setdefault(sample["labels"][0], []).append(sample)
    most = max(map(len, by_label.values()))
    return [mine[number % len(mine)] for mine in by_label.values() for number in range(most)]
