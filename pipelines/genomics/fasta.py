"""FASTA files, plain or compressed, one record at a time: files of any length need the memory of one record.

Letters become upper-case DNA (U is T). What cannot be RNA or DNA is refused with the line of its record; records that
are too short are counted and left out.
"""

from __future__ import annotations

import re
import sqlite3
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import InputError, MissingDependencyError

SHORTEST = 100
"""Shorter transcripts are left out, as in the paper's data."""

PROTEIN = frozenset("EFILPQ")
"""Letters of amino acids that stand for no nucleotide, not even an ambiguous one."""

MOST_UNKNOWN = 0.2
"""Largest share of letters other than A, C, G, T and U."""

_DNA = str.maketrans("acgtunU", "ACGTTNT", " \t*-.")
_KNOWN = re.compile("[^ACGT]")


@dataclass(frozen=True)
class Record:
    """One transcript.

    Attributes:
        id: the first word of its header.
        header: the whole header.
        sequence: upper-case DNA letters.
        number: its place in the file, from 1.
    """

    id: str
    header: str
    sequence: str
    number: int


@dataclass
class Tally:
    """What was read.

    Attributes:
        read: all records; ``short`` of them were left out.
        mixed: records with both T and U, read as DNA; ``mixed_id`` is the first of them.
    """

    read: int = 0
    short: int = 0
    mixed: int = 0
    mixed_id: str = ""
    shortest: int = SHORTEST

    def remarks(self) -> list[str]:
        """Sentences on what was left out or changed."""
        found = {
            f"{self.short} of {self.read} transcripts are shorter than {self.shortest} nt and left out": self.short,
            f"{self.mixed} records have both T and U (first: '{self.mixed_id}'), read as the same letter": self.mixed,
        }
        return [sentence for sentence, count in found.items() if count]


class _Seen:
    """Ids of any number of records, in a temporary database that goes to disk when it grows."""

    def __init__(self) -> None:
        self._base = sqlite3.connect("", isolation_level=None)
        self._base.execute("PRAGMA journal_mode=OFF")
        self._base.execute("CREATE TABLE seen (id TEXT PRIMARY KEY) WITHOUT ROWID")
        self.close = self._base.close

    def new(self, name: str) -> bool:
        return self._base.execute("INSERT OR IGNORE INTO seen VALUES (?)", (name,)).rowcount == 1


def read(path: Path, tally: Tally | None = None, shortest: int = SHORTEST) -> Iterator[Record]:
    """The usable records of a FASTA file (also .gz, .bz2, .xz, .zst), in order.

    Args:
        tally: counts what is read and left out.
        shortest: records with fewer nucleotides are left out.

    Raises:
        InputError: no such file, not FASTA, an id twice, letters of a protein, more than 20 % other letters than
            A, C, G, T and U, or no usable record at all; with the line where it is.
        MissingDependencyError: the package dnaio is not installed, or for .zst, backports.zstd.
    """
    tally = Tally() if tally is None else tally
    tally.shortest = shortest
    usable, number = 0, 0
    with closing(_raw(path)) as raw, closing(_Seen()) as seen:
        for number, (header, text) in enumerate(raw, 1):
            name = header.split(maxsplit=1)[0] if header.strip() else ""
            record = Record(name, header, dna(text), number)
            reason = fault(name, record.sequence) if name else "the record has no id after '>'"
            if reason:
                raise refused(path, number, reason)
            if not seen.new(name):
                raise refused(path, number, f"the id '{name}' was used by an earlier record: every id must be its own")
            tally.read += 1
            if "T" in text.upper() and "U" in text.upper():
                tally.mixed += 1
                tally.mixed_id = tally.mixed_id or name
            if len(record.sequence) < shortest:
                tally.short += 1
                continue
            usable += 1
            yield record
    if not number:
        raise InputError(f"'{path}' is empty: a FASTA file has records that begin with '>'.")
    if not usable:
        raise InputError(f"All {number} transcripts in '{path}' are shorter than {shortest} nt: none is left.")


def count(path: Path) -> int:
    """How many records a file seems to have, for progress; 0 if it cannot be read."""
    _dnaio()
    try:
        with _open(path) as lines:
            return sum(line.startswith(">") for line in lines)
    except (OSError, EOFError, zlib.error):
        return 0


def dna(text: str) -> str:
    """Letters as upper-case DNA, without gaps and spaces."""
    return text.translate(_DNA).upper()


def fault(name: str, sequence: str) -> str:
    """What is wrong with a sequence from :func:`dna`; empty if nothing is."""
    if not sequence:
        return f"'{name}' has no sequence"
    strange = _KNOWN.findall(sequence)
    if protein := sorted(PROTEIN.intersection(strange)):
        return f"'{name}' is a protein, it has the letter {protein[0]}: give nucleotides"
    if len(strange) > MOST_UNKNOWN * len(sequence):
        return (
            f"{len(strange) / len(sequence):.0%} of '{name}' are letters other than A, C, G, T and U, at most "
            f"{MOST_UNKNOWN:.0%} can be: leave the record out"
        )
    return ""


def refused(path: Path, number: int, reason: str) -> InputError:
    """The error about record ``number``, with the line of its header."""
    return InputError(f"'{path}', line {_line_of(path, number)}: {reason}.")


def _line_of(path: Path, number: int) -> int:
    """Line of a record's header, from 1."""
    count = 0
    with _open(path) as lines:
        for line, content in enumerate(lines, 1):
            count += content.lstrip().startswith(">")
            if count == number:
                return line
    return 0


def _raw(path: Path) -> Generator[tuple[str, str]]:
    """(header, letters) of every record."""
    path = Path(path)
    dnaio = _dnaio()
    if not path.is_file():
        raise InputError(f"There is no file '{path}'.")
    try:
        with dnaio.open(path, fileformat="fasta") as records:
            for record in records:
                yield record.name, record.sequence
    except dnaio.FileFormatError as error:
        place = f", line {error.line + 1}" if error.line is not None else ""
        raise InputError(f"'{path}'{place}: this is not FASTA, {_lower(error.message)}") from None
    except UnicodeDecodeError:
        raise InputError(f"'{path}' is not FASTA: it holds bytes that are no text.") from None
    except ImportError:
        raise _no_zstd() from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"'{path}' cannot be read to its end ({error or type(error).__name__}).") from None


def _lower(text: str) -> str:
    text = text.rstrip(".").replace("\n", " ")
    return f"{text[:1].lower()}{text[1:]}."


def _open(path: Path) -> Any:
    from xopen import xopen  # dnaio brings it

    try:
        return xopen(path, "rt", encoding="utf-8", errors="replace", threads=0)
    except ImportError:
        raise _no_zstd() from None


def _no_zstd() -> MissingDependencyError:
    """For the one compression that Python cannot undo by itself, and xopen only since 2.1."""
    return MissingDependencyError("backports.zstd", "genomics", "Reading .zst files")


def _dnaio() -> Any:
    try:
        import dnaio
    except ImportError:
        raise MissingDependencyError("dnaio", "genomics", "Reading FASTA files") from None
    return dnaio
