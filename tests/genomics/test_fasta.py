"""FASTA: what is read, what is left out and counted, and what is refused with its line."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import pytest

from adapters.errors import InputError, MissingDependencyError
from pipelines.genomics import fasta
from tests.genomics.conftest import letters, write_fasta


def test_records_become_dna_and_short_ones_are_counted(tmp_path):
    rna = letters(120, 0, "ACGU")
    file = write_fasta(tmp_path / "a.fa", {
        "one gene=G1 a story": letters(150, 1).lower(), "two": rna, "short": letters(99, 2), "mixed": rna + "T",
    })  # fmt: skip
    tally = fasta.Tally()
    found = list(fasta.read(file, tally))
    assert [record.id for record in found] == ["one", "two", "mixed"]
    assert [record.number for record in found] == [1, 2, 4]
    assert found[0].header == "one gene=G1 a story"
    assert found[0].sequence == letters(150, 1)
    assert found[1].sequence == rna.replace("U", "T")
    assert tally.remarks() == [
        "1 of 4 transcripts are shorter than 100 nt and left out",
        "1 records have both T and U (first: 'mixed'), read as the same letter",
    ]


@pytest.mark.parametrize("ending", ["fa.gz", "fa.bz2", "fa.xz", "fasta"])
def test_compressed_files_read_alike(tmp_path, ending):
    import bz2
    import lzma

    plain = write_fasta(tmp_path / "plain.fa", {"a": letters(130, 3), "b": letters(140, 4)})
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(ending[3:], bytes)
    (tmp_path / f"other.{ending}").write_bytes(pack(plain.read_bytes()))
    assert list(fasta.read(tmp_path / f"other.{ending}")) == list(fasta.read(plain))


def test_zst_without_its_package_is_one_sentence(tmp_path, monkeypatch):
    """As with an older xopen, which does not bring it."""
    import dnaio
    import xopen

    def missing(*_, **__):
        raise ImportError("zstandard module (or the zstd command line program) not available")

    (tmp_path / "a.fa.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setattr(dnaio, "open", missing)
    monkeypatch.setattr(xopen, "xopen", missing)
    for act in (lambda path: list(fasta.read(path)), fasta.count):
        with pytest.raises(MissingDependencyError, match=r"Reading .zst files .*backports.zstd.*genomics"):
            act(tmp_path / "a.fa.zst")


def test_windows_lines_and_blank_lines(tmp_path):
    file = tmp_path / "dos.fa"
    file.write_bytes(b"\r\n>a x\r\n" + letters(100, 5).encode() + b"\r\n\r\n>b\r\n" + letters(100, 6).encode())
    assert [record.sequence for record in fasta.read(file)] == [letters(100, 5), letters(100, 6)]


GOOD = f">good\n{letters(120, 7)}\n"

REFUSED = {
    "empty": ("", "is empty"),
    "no FASTA": ("hello\n", r"line 1: this is not FASTA, expected '>'"),
    "no id": (f"{GOOD}> \nACGT\n", r"line 3: the record has no id"),
    "nothing": (f"{GOOD}>void\n>last\n{letters(120, 1)}\n", r"line 3: 'void' has no sequence"),
    "twice": (f"{GOOD}>b\n{letters(120, 1)}\n{GOOD}", r"line 5: the id 'good' was used by an earlier record"),
    "protein": (f"{GOOD}\n>p\nMKVLEQ\n", r"line 4: 'p' is a protein, it has the letter E"),
    "unknown": (f"{GOOD}>n\n{'N' * 30}{letters(100, 1)}\n", r"line 3: 23% of 'n' are letters other than"),
    "short": (f">s\n{letters(99, 1)}\n", r"All 1 transcripts in .* are shorter than 100 nt"),
    "fastq": (f"@r\n{letters(100, 1)}\n+\n{'I' * 100}\n", r"line 1: this is not FASTA"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, case):
    text, sentence = REFUSED[case]
    (tmp_path / "bad.fa").write_text(text)
    with pytest.raises(InputError, match=sentence) as error:
        list(fasta.read(tmp_path / "bad.fa"))
    assert str(error.value).count("\n") == 0


def test_refused_files(tmp_path):
    (tmp_path / "text.fa.gz").write_bytes(gzip.compress(b"not a record\n"))
    with pytest.raises(InputError, match=r"line 1: this is not FASTA"):
        list(fasta.read(tmp_path / "text.fa.gz"))
    whole = gzip.compress(f">a\n{letters(5000, 1)}\n".encode())
    (tmp_path / "cut.fa.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read to its end"):
        list(fasta.read(tmp_path / "cut.fa.gz"))
    (tmp_path / "bytes.fa").write_bytes(bytes(range(128, 256)) * 10)
    with pytest.raises(InputError, match="bytes that are no text"):
        list(fasta.read(tmp_path / "bytes.fa"))
    with pytest.raises(InputError, match="There is no file"):
        list(fasta.read(tmp_path / "missing.fa"))


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Twenty thousand records pass in less than the memory of a few hundred."""
    file, text = tmp_path / "many.fa.gz", letters(400, 8)
    with gzip.open(file, "wt", compresslevel=1) as out:
        for number in range(20_000):
            out.write(f">transcript-{number}\n{text}\n")
    assert sum(1 for _ in fasta.read(Path(file))) == 20_000
    tracemalloc.start()
    for _ in fasta.read(Path(file)):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
