"""Open reading frames: what of a transcript could be a protein.

In each frame, at ATG, codons are taken up to and including TAA, TAG or TGA, or else to the end of the sequence (a last
incomplete codon belongs to it); the search goes on behind it. The longest over the frames wins, the first of equals.
A codon with a letter other than A, C, G, T ends a frame without belonging to it. The published LoRA-BERT searches both
strands; the reverse strand of a stranded RNA is never read, so ``strands="forward"`` is the default here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Strands = Literal["forward", "both"]

SHORTEST = 100
"""The paper learns from ORFs of at least so many nucleotides."""

CODES = np.full(256, 4, dtype=np.int64)
"""Number of a letter: A 0, T 1, C 2, G 3, anything else 4."""
CODES[np.frombuffer(b"ATCG", dtype=np.uint8)] = range(4)

_COMPLEMENT = str.maketrans("ACGTRYSWKMBDHVN", "TGCAYRSWMKVHDBN")


@dataclass(frozen=True)
class Orf:
    """A reading frame.

    Attributes:
        start, end: half-open range on its strand, from 0.
        strand: "+", or "-" for the reverse complement.
        complete: it has a stop codon.
    """

    start: int
    end: int
    strand: str = "+"
    complete: bool = True

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def frame(self) -> int:
        """1, 2 or 3."""
        return self.start % 3 + 1

    def of(self, sequence: str) -> str:
        """The nucleotides, from ATG on."""
        return (sequence if self.strand == "+" else reverse_complement(sequence))[self.start : self.end]

    def place(self, length: int) -> tuple[int, int]:
        """First and last nucleotide on the forward strand, counted from 1, of a transcript with ``length`` nt."""
        return (self.start + 1, self.end) if self.strand == "+" else (length - self.end + 1, length - self.start)


def reverse_complement(sequence: str) -> str:
    """The other strand, read from its own start."""
    return sequence.translate(_COMPLEMENT)[::-1]


def longest_orf(sequence: str, strands: Strands = "forward") -> Orf | None:
    """The longest reading frame of upper-case DNA; None without ATG."""
    found = list(_orfs(sequence, "+"))
    if strands == "both":
        found += _orfs(reverse_complement(sequence), "-")
    return max(found, key=len, default=None)  # max keeps the first of equals


def codes_of(sequence: str) -> np.ndarray:
    """The letters as numbers (n,): A 0, T 1, C 2, G 3, anything else 4."""
    return CODES[np.frombuffer(sequence.encode("ascii", "replace"), dtype=np.uint8)]


def _orfs(sequence: str, strand: str) -> Iterator[Orf]:
    """All reading frames of one strand, frame by frame."""
    codes = codes_of(sequence)
    if len(codes) < 3:
        return
    codon = 25 * codes[:-2] + 5 * codes[1:-1] + codes[2:]
    starts, stops = np.flatnonzero(codon == _ATG), np.isin(codon, _STOPS)
    breaks = (codes[:-2] > 3) | (codes[1:-1] > 3) | (codes[2:] > 3)
    ends = np.flatnonzero(stops | breaks)
    for frame in range(3):
        mine, after = ends[ends % 3 == frame], -1
        for start in starts[starts % 3 == frame].tolist():
            if start < after:
                continue
            number = int(np.searchsorted(mine, start))
            if number == len(mine):
                tail = (len(codes) - frame) % 3
                partial = tail and not (codes[len(codes) - tail :] > 3).any()
                yield Orf(start, len(codes) if partial else len(codes) - tail, strand, complete=False)
                break
            stop = int(mine[number])
            complete = not breaks[stop]
            after = stop + 3 if complete else stop
            yield Orf(start, after, strand, complete)


def _codon(text: str) -> int:
    a, b, c = codes_of(text).tolist()
    return int(25 * a + 5 * b + c)


_ATG = _codon("ATG")
_STOPS = [_codon(stop) for stop in ("TAA", "TAG", "TGA")]
