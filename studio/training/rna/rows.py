"""Reads the transcripts of a training before any model is loaded (and without torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapters.errors import InputError
from pipelines.genomics.fasta import dna, fault
from studio.datasets import transcripts
from studio.datasets.transcripts import Transcript
from studio.training.language.rows import Rows
from studio.training.schemas.rna import TrainRnaConfig


@dataclass
class RnaRows(Rows):
    """Rows that are transcripts; ``source`` has the names of their files."""

    source: str = ""


def read(config: TrainRnaConfig) -> RnaRows:
    """The transcripts of a job, split by gene.

    Raises:
        InputError: as :func:`studio.datasets.transcripts.read`, or a sample prompt that is no RNA.
    """
    labels = config.labels if config.task == "classification" else []
    found = transcripts.read(config.data, labels, config.labels_file, config.shortest, config.limit)
    shown, held_out, remarks, digest = found.items, list[Transcript](), found.remarks, found.digest
    if config.validation_data:
        other = transcripts.read(config.validation_data, labels, config.labels_file, config.shortest)
        held_out, digest = other.items, f"{digest} {other.digest}"
        remarks = [*remarks, *(f"validation: {one}" for one in other.remarks), *_shared(shown, held_out)]
    elif config.validation_split:
        shown, held_out = transcripts.split(shown, config.validation_split, config.seed)
    for number, prompt in enumerate(config.sample_prompts, 1):
        if reason := fault(f"sample prompt {number}", dna(prompt)):
            raise InputError(f"{reason[0].upper()}{reason[1:]}.")
    return RnaRows(shown, held_out, list(labels), {}, digest, [], remarks, found.source)


def _shared(shown: Sequence[Transcript], held_out: Sequence[Transcript]) -> list[str]:
    """Sentences on genes or sequences that are on both sides."""
    genes = {item.gene for item in shown if item.gene} & {item.gene for item in held_out}
    equal = {item.record.sequence for item in shown} & {item.record.sequence for item in held_out}
    said = {
        f"{len(genes)} genes are in data and in validation_data: what is measured there is partly known": len(genes),
        f"{len(equal)} sequences are in data and in validation_data": len(equal),
    }
    return [sentence for sentence, count in said.items() if count]
