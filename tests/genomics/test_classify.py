"""Scoring FASTA files as a job: the table against stock transformers, resuming, the command, Python."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import studio
from adapters.errors import Cancelled, InputError
from pipelines.genomics.kmers import Kmers
from pipelines.genomics.orf import longest_orf
from studio.cli.app import run as command
from studio.genomics import job, table
from studio.genomics.schema import ClassifyRnaConfig
from tests.genomics.conftest import letters, write_fasta
from tests.language.conftest import Watcher


@pytest.fixture(scope="module")
def transcripts(tmp_path_factory) -> Path:
    records = {f"t{n} note": letters(90 + 7 * n, n) for n in range(50)}
    records["none"] = "CCC" * 40
    return write_fasta(tmp_path_factory.mktemp("fasta") / "a.fa", records)


def config(base: Path, file: Path, **values: object) -> ClassifyRnaConfig:
    return ClassifyRnaConfig.parse({"base": str(base), "adapter": "", "file": str(file), "device": "cpu", **values})


class Stops:
    """A monitor that asks to stop after so many transcripts."""

    def __init__(self, after: int) -> None:
        self.after, self.step = after, 0

    def report(self, progress) -> None:
        self.step = progress.step if progress.stage == "classifying" else 0

    def cancelled(self) -> bool:
        return self.step >= self.after


def test_the_table_is_what_the_model_says(classified, transcripts, tmp_path):
    """Row by row against stock transformers on the unpadded transcript; probabilities add up to 1; ORFs in place."""
    result = job.run(config(classified, transcripts), tmp_path, Watcher())
    with Path(result["table"]).open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["id"] for row in rows] == [*(f"t{n}" for n in range(2, 50)), "none"]
    assert result["skipped"] == 2
    assert result["remarks"][1] == "2 of 51 transcripts are shorter than 100 nt and left out"
    assert sum(result["histogram"]) == sum(result["counts"].values()) == len(rows) == result["transcripts"]
    model, kmers = AutoModelForSequenceClassification.from_pretrained(classified).eval(), Kmers.read(classified, 64)
    for number, row in list(enumerate(rows, 2))[:-1:7]:
        sequence = letters(90 + 7 * number, number)
        with torch.no_grad():
            share = model(input_ids=torch.tensor([kmers.encode(sequence)])).logits.softmax(-1)[0, 1]
        assert float(row["p_lncRNA"]) == pytest.approx(float(share), abs=1e-5)
        assert float(row["p_lncRNA"]) + float(row["p_mRNA"]) == pytest.approx(1, abs=1e-9)
        assert row["label"] == ("lncRNA" if float(row["p_lncRNA"]) >= 0.5 else "mRNA")
        frame = longest_orf(sequence)
        assert (int(row["orf_length"] or 0), row["length"]) == (len(frame) if frame else 0, str(len(sequence)))
        if frame:
            assert sequence[int(row["orf_start"]) - 1 : int(row["orf_end"])] == frame.of(sequence)
        assert row["remark"] == ("longer than is read" if len(sequence) > kmers.reach else "")
    assert json.loads(Path(result["summary"]).read_text())["rows"][0]["id"] == "t2"


def test_views_windows_and_thresholds(classified, transcripts, tmp_path):
    both = job.run(config(classified, transcripts, view="both"), tmp_path / "a", Watcher())
    found = table.read(Path(both["table"]))
    assert all(row["margin_orf"] or not row["orf_start"] for row in found)
    orf = job.run(config(classified, transcripts, view="orf"), tmp_path / "b", Watcher())
    last = table.read(Path(orf["table"]))[-1]
    assert (last["label"], last["p_lncRNA"], last["remark"]) == ("", "", "no ORF to read")
    assert "transcripts have no ORF, and no label" in " ".join(orf["remarks"])
    wide = job.run(config(classified, transcripts, long="windows"), tmp_path / "c", Watcher())
    assert not any("first part" in remark for remark in wide["remarks"])
    high = job.run(config(classified, transcripts, threshold=0.999999), tmp_path / "d", Watcher())
    assert high["counts"] == {"mRNA": 49}


def test_stopped_and_resumed_gives_the_same_table(classified, transcripts, tmp_path):
    whole = job.run(config(classified, transcripts), tmp_path / "whole", Watcher())
    with pytest.raises(Cancelled, match="Stopped after 16 transcripts"):
        job.run(config(classified, transcripts), tmp_path / "part", Stops(1))
    part = tmp_path / "part" / job.PART
    part.write_bytes(part.read_bytes()[:-7])  # a row that a crash cut short
    resumed = job.run(config(classified, transcripts), tmp_path / "part", Watcher(), resume=True)
    assert Path(whole["table"]).read_bytes() == Path(resumed["table"]).read_bytes()
    assert Path(whole["summary"]).read_bytes() == Path(resumed["summary"]).read_bytes()
    assert not part.exists()


def test_the_command_and_python(classified, transcripts, tmp_path, capsys):
    packed = tmp_path / "a.fa.gz"
    packed.write_bytes(gzip.compress(transcripts.read_bytes()))
    asked = ["classify", "rna", str(packed), "--base", str(classified), "--adapter", "", "--device", "cpu"]
    assert command([*asked, "--out", str(tmp_path / "scores.tsv"), "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["table"] == str(tmp_path / "scores.tsv")
    rows = studio.classify(transcripts, "", base=classified, device="cpu")
    assert rows == table.read(tmp_path / "scores.tsv")
    assert command([*asked, "--quiet"]) == 0
    assert "49 transcripts: " in capsys.readouterr().out
    bad = write_fasta(tmp_path / "bad.fa", {"x": letters(120, 1), "p": "MKVLEQ"})
    assert command(["classify", "rna", str(bad), "--base", str(classified), "--adapter", ""]) == 2
    assert "line 4: 'p' is a protein" in capsys.readouterr().err
    with pytest.raises(InputError, match="shorter than 100 nt"):
        job.ready(config(classified, write_fasta(tmp_path / "s.fa", {"x": "ACGT"})))
