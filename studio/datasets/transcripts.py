"""Transcripts with labels and genes, from FASTA files: what a training of RNA learns from.

A label comes from the file's name for it (``lncRNA=nc.fa``), else from a table of ids, else from ``label=...`` in the
header. A gene comes from the table, else from the header (``gene=...``, ``gene:...``, or GENCODE's
``ENST...|ENSG...``).
Transcripts of one gene, and equal sequences, are never divided by :func:`split`.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from adapters.errors import InputError, nearest
from pipelines.genomics import fasta
from studio.datasets.seeds import rng

FEWEST = 10
"""A label with fewer transcripts cannot be learnt."""

_GENE = re.compile(r"(?:^|[\s;|])gene(?:_id)?[=:]([^\s;|]+)", re.IGNORECASE)
_GENCODE = re.compile(r"^ENS\w*T\d[\w.]*\|(ENS\w*G\d[\w.]*)\|?")
_LABEL = re.compile(r"(?:^|[\s;|])label[=:]([^\s;|]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Transcript:
    """A record with what is known about it.

    Attributes:
        label: 0 or 1; None without labels.
        gene: empty if nothing says it.
    """

    record: fasta.Record
    label: int | None
    gene: str


@dataclass
class Transcripts:
    """What was read.

    Attributes:
        remarks: sentences on what was left out or assumed.
        source: names of the files.
        digest: identity of sequences, labels and genes.
    """

    items: list[Transcript]
    remarks: list[str] = field(default_factory=list)
    source: str = ""
    digest: str = ""


@dataclass(frozen=True)
class _Entry:
    """A line of the table."""

    label: str
    gene: str


def read(
    files: Sequence[str],
    labels: Sequence[str] = (),
    table: str = "",
    shortest: int = fasta.SHORTEST,
    limit: int | None = None,
) -> Transcripts:
    """The transcripts of some FASTA files.

    Args:
        files: paths, each perhaps as ``LABEL=PATH``.
        labels: the names of the two labels; empty = labels are not needed, and not read.
        table: file with the columns id, label and perhaps gene.
        shortest: shorter transcripts are left out.
        limit: stop after so many usable records of each file.

    Raises:
        InputError: as :func:`pipelines.genomics.fasta.read`; an id in two files; a transcript without a label, or with
            one that is not among ``labels``; one label only, or fewer than 10 transcripts of one.
    """
    listed = _table(table) if table else {}
    named = [_named(text, labels) for text in files]
    seen: dict[str, str] = {}
    items: list[Transcript] = []
    remarks: list[str] = []
    for label, path in named:
        tally = fasta.Tally()
        for record in islice(fasta.read(path, tally, shortest), limit):
            if record.id in seen:
                raise fasta.refused(path, record.number, f"the id '{record.id}' is in '{seen[record.id]}' too")
            seen[record.id] = path.name
            entry = listed.get(record.id, _Entry("", ""))
            found = label or entry.label or _first(_LABEL, record.header)
            number = _number(found, labels, record, path) if labels else None
            gene = entry.gene or _first(_GENE, record.header) or _first(_GENCODE, record.header)
            items.append(Transcript(record, number, gene))
        remarks += tally.remarks()
    if labels:
        _enough(items, labels)
        remarks += _genes(items, labels)
    unknown = [name for name in listed if name not in seen]
    if unknown and limit is None:
        remarks.append(f"{len(unknown)} ids of the table are not among the transcripts read (first: '{unknown[0]}')")
    return Transcripts(items, remarks, ", ".join(path.name for _, path in named), _digest(items))


def split(items: Sequence[Transcript], share: float, seed: int) -> tuple[list[Transcript], list[Transcript]]:
    """(shown, held out): about a share of each label is held out, whole genes at a time, drawn once for a seed.

    Raises:
        InputError: a label would be on one side only.
    """
    groups = list(_groups(items))
    held: set[int] = set()
    for label in sorted({items[group[0]].label for group in groups}, key=str):
        mine = [group for group in groups if items[group[0]].label == label]
        rng(seed, f"genes-{label}").shuffle(mine)
        wanted = max(1, round(share * sum(map(len, mine))))
        count = 0
        for group in mine[:-1]:  # one gene is always left to learn from
            if count >= wanted:
                break
            held |= set(group)
            count += len(group)
        if not count:
            raise InputError("A label has one gene only, which cannot be on both sides: lower validation_split to 0.")
    return (
        [item for number, item in enumerate(items) if number not in held],
        [item for number, item in enumerate(items) if number in held],
    )


def _groups(items: Sequence[Transcript]) -> Iterator[list[int]]:
    """Numbers of transcripts that belong together: of one gene, or with equal sequences."""
    parent = list(range(len(items)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    first: dict[tuple[str, str], int] = {}
    for number, item in enumerate(items):
        for key in (("gene", item.gene), ("sequence", item.record.sequence)):
            if key[1]:
                parent[root(number)] = root(first.setdefault(key, number))
    together: dict[int, list[int]] = {}
    for number in range(len(items)):
        together.setdefault(root(number), []).append(number)
    yield from together.values()


def _named(text: str, labels: Sequence[str]) -> tuple[str, Path]:
    """(label, path) of ``LABEL=PATH`` or a path alone."""
    label, sign, rest = text.partition("=")
    path = Path(text).expanduser()
    if sign and not path.exists() and "/" not in label:
        if labels and label not in labels:
            raise InputError(f"The label '{label}' of '{rest}' is neither {labels[0]} nor {labels[1]}: see labels.")
        return (label if labels else ""), Path(rest).expanduser()
    return "", path


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found.group(1) if found else ""


def _number(label: str, labels: Sequence[str], record: fasta.Record, path: Path) -> int:
    if not label:
        raise fasta.refused(
            path, record.number,
            f"'{record.id}' has no label: write LABEL=FILE, give a labels_file, or label={labels[1]} in the header",
        )  # fmt: skip
    if label not in labels:
        raise fasta.refused(
            path, record.number,
            f"the label '{label}' of '{record.id}' is neither {labels[0]} nor {labels[1]}{nearest(label, labels)}: see "
            "labels",
        )  # fmt: skip
    return list(labels).index(label)


def _enough(items: Sequence[Transcript], labels: Sequence[str]) -> None:
    counts = [sum(item.label == number for item in items) for number in range(len(labels))]
    for label, count in zip(labels, counts, strict=True):
        if count == 0:
            other = labels[1 - list(labels).index(label)]
            raise InputError(f"Every transcript is labelled {other}, none {label}: two kinds are needed.")
        if count < FEWEST:
            raise InputError(f"Only {count} transcripts are labelled {label}: at least {FEWEST} are needed.")


def _genes(items: Sequence[Transcript], labels: Sequence[str]) -> list[str]:
    """Sentences on genes that are not known, or have both labels."""
    unknown = sum(not item.gene for item in items)
    by_gene: dict[str, set[int | None]] = {}
    for item in items:
        if item.gene:
            by_gene.setdefault(item.gene, set()).add(item.label)
    both = [gene for gene, found in by_gene.items() if len(found) > 1]
    said = {
        f"{unknown} of {len(items)} transcripts name no gene: isoforms of one may be learnt from and held out": unknown,
        f"{len(both)} genes have transcripts of both labels (first: '{both[0] if both else ''}')": len(both),
    }
    return [sentence for sentence, count in said.items() if count]


def _table(place: str) -> Mapping[str, _Entry]:
    """id -> label and gene.

    Raises:
        InputError: no such file, a column that is missing, or an id twice.
    """
    path = Path(place).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"The table of labels '{path}' cannot be read.") from None
    reader = csv.DictReader(text.splitlines(), delimiter="," if path.suffix.lower() == ".csv" else "\t")
    columns = {str(name).strip().lower(): name for name in reader.fieldnames or ()}
    for name in ("id", "label"):
        if name not in columns:
            raise InputError(f"'{path}' has no column '{name}': it has {', '.join(columns) or 'nothing'}.")
    found: dict[str, _Entry] = {}
    for row in reader:
        name = (row[columns["id"]] or "").strip()
        if name in found:
            raise InputError(f"'{path}', line {reader.line_num}: the id '{name}' is there twice.")
        gene = (row.get(columns["gene"]) or "").strip() if "gene" in columns else ""
        found[name] = _Entry((row[columns["label"]] or "").strip(), gene)
    return found


def _digest(items: Sequence[Transcript]) -> str:
    total = hashlib.sha256()
    for item in items:
        total.update(f"{item.record.id}\t{item.label}\t{item.gene}\t{item.record.sequence}\n".encode())
    return total.hexdigest()
