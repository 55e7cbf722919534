"""The job that classifies a FASTA file: a table of scores, in the memory of a few hundred transcripts."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import files
from adapters.errors import Cancelled, InputError
from adapters.progress import Monitor, Progress
from pipelines.genomics import fasta
from studio import library
from studio.genomics import table
from studio.genomics.schema import ClassifyRnaConfig

if TYPE_CHECKING:
    from pipelines.genomics.classifier import RnaClassifier

TABLE, PART, SUMMARY = "scores.tsv", "scores.part.tsv", "summary.json"


def ready(config: ClassifyRnaConfig) -> None:
    """Check file, base and adapter before a job is made.

    Raises:
        InputError: the first of them that cannot be used.
    """
    library.resolve_rna(config.base)
    if config.adapter:
        library.resolve_adapter(config.adapter)
    next(fasta.read(Path(config.file).expanduser(), shortest=config.shortest))


def run(config: ClassifyRnaConfig, folder: Path, monitor: Monitor, resume: bool = False) -> dict[str, Any]:
    """Classify every transcript of ``config.file``.

    Args:
        folder: gets ``scores.tsv`` (in the order of the file) and ``summary.json``.
        resume: keep the rows that are written already.

    Returns:
        ``table`` and ``summary`` (paths), ``transcripts``, ``counts`` by label, ``skipped``, ``threshold``,
        ``histogram`` (transcripts by twentieth of the probability of the second label), ``labels``, ``remarks``,
        ``seconds``.

    Raises:
        InputError: a file, base or adapter that cannot be used.
        Cancelled: stopped on request; what is written is kept for resuming.
    """
    begun = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(config.file).expanduser()
    monitor.report(Progress("loading", message=f"Loading {config.base}"))
    classifier = opened(config)
    for remark in classifier.remarks:
        monitor.report(Progress("loading", message=remark))
    threshold = classifier.task.threshold if config.threshold is None else config.threshold
    summary = table.Summary(classifier.task.labels)
    tally, part, total = fasta.Tally(), folder / PART, fasta.count(path)
    if not resume:
        part.unlink(missing_ok=True)
    for cells in table.kept(part, summary.labels):
        summary.add(cells)
    done = summary.rows
    try:
        with part.open("a", encoding="utf-8", newline="\n") as out:
            if not done:
                out.write("\t".join(table.columns(summary.labels)) + "\n")
            for cells in _rows(classifier, config, path, tally, done, threshold):
                out.write("\t".join(cells) + "\n")
                summary.add(cells)
                if summary.rows % 16 == 0 or summary.rows == total:
                    monitor.report(Progress("classifying", tally.read, total))
                    if monitor.cancelled():
                        raise Cancelled(f"Stopped after {summary.rows} transcripts; the job can be resumed.")
    except OSError as error:
        raise InputError(
            f"'{part}' could not be written ({error.strerror}): free some space and resume the job."
        ) from None
    part.replace(folder / TABLE)
    remarks = [*classifier.remarks, *tally.remarks(), *summary.remarks()]
    told = {
        "labels": list(summary.labels), "transcripts": summary.rows, "skipped": tally.short, "counts": summary.counts,
        "threshold": threshold, "histogram": summary.histogram, "remarks": remarks,
    }  # fmt: skip
    files.write_text(folder / SUMMARY, json.dumps({**told, "rows": summary.drawn}, indent=1) + "\n")
    monitor.report(Progress("classifying", total, total, message="; ".join(remarks)))
    return {"table": str(folder / TABLE), "summary": str(folder / SUMMARY), **told,
            "seconds": round(time.perf_counter() - begun, 2)}  # fmt: skip


def opened(config: ClassifyRnaConfig) -> RnaClassifier:
    """The classifier that ``config`` names, reading as it says.

    Raises:
        InputError: base and adapter cannot be used, or do not belong together.
    """
    from pipelines.genomics.classifier import RnaClassifier
    from studio import devices

    base = Path(library.resolve_rna(config.base))
    adapter = library.resolve_adapter(config.adapter) if config.adapter else None
    found = RnaClassifier.open(base, adapter, dtype=config.dtype, device=devices.resolve(config.device))
    changes: dict[str, Any] = {
        name: value for name in ("view", "long") if (value := getattr(config, name)) != "as-trained"
    }
    return dataclasses.replace(found, task=dataclasses.replace(found.task, **changes))


def _rows(
    classifier: RnaClassifier, config: ClassifyRnaConfig, path: Path, tally: fasta.Tally, done: int, threshold: float
) -> Iterator[list[str]]:
    """The cells of every transcript after the first ``done``."""
    records = fasta.read(path, tally, config.shortest)
    for _ in range(done):
        next(records, None)
    for score in classifier.stream(records, config.batch_tokens):
        yield table.row(score, classifier.task, threshold)
