"""Real transcripts with labels: human chromosome X in Debian's package transdecoder-doc (BSD-3-Clause).

``python -m assets.build.transcripts`` fetches the package with apt-get, or reads ``--package FILE.deb``, and writes
into ``--out``

    labelled.fa     one transcript of each gene: mRNA (RefSeq NM_) and non-coding RNA of 200 nt or more (NR_); genes
                    with both kinds are left out. Headers end in ``gene=... label=...``.
    unlabelled.fa   transcripts that StringTie assembled and no annotation names (MSTRG), for pre-training.

A gene is StringTie's: transcripts of overlapping loci belong together.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from adapters import files
from adapters.errors import InputError
from assets.build.common import build_dir
from pipelines.genomics import fasta
from pipelines.genomics.fasta import Record

PACKAGE = "transdecoder-doc"
VERSION = "5.0.1"
INSIDE = "usr/lib/transdecoder/sample_data/stringtie_example"
LABELS = {"NM": "mRNA", "NR": "lncRNA"}
SHORTEST_NON_CODING = 200


def unpacked(package: Path | None, place: Path) -> Path:
    """The folder of the package's transcripts, unpacked below ``place``.

    Raises:
        InputError: the package cannot be fetched or is another.
    """
    try:
        if package is None:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=place, check=True, capture_output=True)
            package = next(place.glob(f"{PACKAGE}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package.resolve()), str(place)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        raise InputError(
            f"The Debian package {PACKAGE} cannot be fetched and unpacked here ({error}): give its file with --package."
        ) from None
    folder = place / INSIDE
    if not folder.is_dir():
        raise InputError(f"'{package}' has no {INSIDE}: it is another version than {VERSION}.")
    return folder


def read(folder: Path) -> tuple[list[Record], dict[str, str]]:
    """All transcripts, and the gene of each by its id."""
    genes = {}
    for line in (folder / "stringtie_merged.gtf").read_text(encoding="utf-8").splitlines():
        if "\ttranscript\t" in line:
            told = dict(re.findall(r'(\w+) "([^"]*)"', line))
            genes[told["transcript_id"]] = told["gene_id"]
    return list(fasta.read(folder / "stringtie_merged.transcripts.fasta", shortest=1)), genes


def labelled(records: Iterable[Record], genes: Mapping[str, str]) -> list[tuple[Record, str, str]]:
    """(transcript, gene, label) of one transcript per gene, the first; without genes of both labels."""
    by_gene: dict[str, list[tuple[Record, str]]] = {}
    for record in records:
        label = LABELS.get(record.id.partition("_")[0])
        if label and (label == "mRNA" or len(record.sequence) >= SHORTEST_NON_CODING):
            by_gene.setdefault(genes[record.id], []).append((record, label))
    return [
        (found[0][0], gene, found[0][1]) for gene, found in by_gene.items() if len({label for _, label in found}) == 1
    ]


def unlabelled(records: Iterable[Record], genes: Mapping[str, str]) -> list[tuple[Record, str]]:
    """(transcript, gene) of those without a RefSeq name."""
    return [(record, genes[record.id]) for record in records if record.id.partition("_")[0] not in LABELS]


def written(header: str, sequence: str, width: int = 80) -> str:
    """A record as FASTA."""
    lines = (sequence[start : start + width] for start in range(0, len(sequence), width))
    return f">{header}\n" + "\n".join(lines) + "\n"


def write(folder: Path, out: Path) -> dict[str, Path]:
    """Write both files from the package's folder; returns them by name."""
    records, genes = read(folder)
    rows = labelled(records, genes)
    texts = {
        "labelled.fa": "".join(written(f"{r.id} gene={gene} label={label}", r.sequence) for r, gene, label in rows),
        "unlabelled.fa": "".join(written(f"{r.id} gene={gene}", r.sequence) for r, gene in unlabelled(records, genes)),
    }
    return {name: files.write_text(out / name, text) for name, text in texts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--package", type=Path, help="the .deb file, instead of fetching it")
    parser.add_argument("--out", type=Path, default=build_dir() / "transcripts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for name, file in write(unpacked(options.package, Path(place)), options.out).items():
            print(f"{name}: {sum(1 for _ in fasta.read(file, shortest=1))} transcripts, {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
