"""Labels and genes of transcripts, the split by gene, and what is refused."""

from __future__ import annotations

import pytest

from adapters.errors import InputError
from studio.datasets import transcripts
from studio.training.rna import rows
from tests.genomics.conftest import letters, settings, write_fasta

LABELS = ("mRNA", "lncRNA")


def many(folder, name: str, count: int, header: str = "", start: int = 0):
    records = {f"{name[0]}{i}{header.format(i=i)}": letters(110, start + i) for i in range(count)}
    return write_fasta(folder / name, records)


def test_labels_come_from_files_tables_and_headers(tmp_path):
    file = many(tmp_path, "a.fa", 12)
    other = many(tmp_path, "b.fa", 12, " label=mRNA gene=B{i}", 100)
    third = many(tmp_path, "c.fa", 2, "", 200)
    table = tmp_path / "labels.tsv"
    table.write_text("ID\tLabel\tGene\nc0\tmRNA\tX\nc1\tlncRNA\tX\nabsent\tmRNA\tY\n")
    found = transcripts.read([f"lncRNA={file}", str(other), str(third)], LABELS, str(table))
    by_id = {item.record.id: item for item in found.items}
    assert (by_id["a0"].label, by_id["b0"].label, by_id["c0"].label, by_id["c1"].label) == (1, 0, 0, 1)
    assert (by_id["a0"].gene, by_id["b3"].gene, by_id["c1"].gene) == ("", "B3", "X")
    assert found.source == "a.fa, b.fa, c.fa"
    assert found.remarks == [
        "12 of 26 transcripts name no gene: isoforms of one may be learnt from and held out",
        "1 genes have transcripts of both labels (first: 'X')",
        "1 ids of the table are not among the transcripts read (first: 'absent')",
    ]
    assert found.digest != transcripts.read([f"lncRNA={file}", str(other)], LABELS).digest


@pytest.mark.parametrize(("header", "gene"), [
    ("x gene=G1", "G1"), ("x cdna chromosome:GRCh38 gene:ENSG1.2 gene_biotype:lncRNA", "ENSG1.2"),
    ("x gene_id=AB;t=1", "AB"),
    ("ENST00000456328.2|ENSG00000290825.1|OTTHUMG|", "ENSG00000290825.1"), ("x nothing", ""),
])  # fmt: skip
def test_genes_of_usual_headers(tmp_path, header, gene):
    file = write_fasta(tmp_path / "a.fa", {header: letters(120, 1)})
    [item] = transcripts.read([str(file)]).items
    assert item.gene == gene
    assert item.label is None


def test_no_gene_and_no_sequence_is_on_both_sides(tmp_path):
    """Isoforms of a gene, equal sequences of two genes: together, whatever the seed; both labels on both sides."""
    records = {}
    for i in range(60):
        label = LABELS[i % 2]
        records[f"t{i} gene=g{i // 4}-{label} label={label}"] = letters(120, i // 2 * 2 if i % 20 == 0 else 1000 + i)
    twin = {f"twin{i} gene=other{i} label={LABELS[i % 2]}": letters(120, 1000 + i) for i in range(1, 9)}
    file = write_fasta(tmp_path / "a.fa", records | twin)
    items = transcripts.read([str(file)], LABELS).items
    for seed in range(5):
        shown, held = transcripts.split(items, 0.25, seed)
        assert len(shown) + len(held) == len(items)
        assert not {item.gene for item in shown} & {item.gene for item in held}
        assert not {item.record.sequence for item in shown} & {item.record.sequence for item in held}
        assert {item.label for item in shown} == {item.label for item in held} == {0, 1}
        assert 0.15 < len(held) / len(items) < 0.4
    assert transcripts.split(items, 0.25, 3) == transcripts.split(items, 0.25, 3)


def test_what_is_refused(tmp_path):
    good, few = many(tmp_path, "a.fa", 12), many(tmp_path, "f.fa", 9, "", 50)
    odd = many(tmp_path, "o.fa", 12, " label=protein", 80)
    table = tmp_path / "t.csv"

    def refused(files: list[str], match: str, text: str = "") -> None:
        if text:
            table.write_text(text)
        with pytest.raises(InputError, match=match) as error:
            transcripts.read(files, LABELS, str(table) if text else "")
        assert "\n" not in str(error.value)

    refused([f"lncRNA={good}"], "Every transcript is labelled lncRNA, none mRNA")
    refused([f"lncRNA={good}", f"mRNA={few}"], "Only 9 transcripts are labelled mRNA: at least 10")
    refused([str(good)], r"line 1: 'a0' has no label: write LABEL=FILE")
    refused([str(odd)], r"line 1: the label 'protein' of 'o0' is neither mRNA nor lncRNA")
    refused([f"ncRNA={good}"], "The label 'ncRNA' of .* is neither mRNA nor lncRNA")
    refused([f"lncRNA={good}", f"mRNA={good}"], r"line 1: the id 'a0' is in 'a.fa' too")
    refused([str(good)], "has no column 'label': it has id", "id\nx\n")
    refused([str(good)], "line 3: the id 'x' is there twice", "id,label\nx,mRNA\nx,mRNA\n")
    with pytest.raises(InputError, match="cannot be read"):
        transcripts.read([str(good)], LABELS, str(tmp_path / "none.tsv"))
    one = write_fasta(tmp_path / "g.fa", {f"g{i} gene=same label={LABELS[i > 14]}": letters(110, i) for i in range(30)})
    with pytest.raises(InputError, match="one gene only"):
        transcripts.split(transcripts.read([str(one)], LABELS).items, 0.3, 0)


def test_shared_genes_of_two_files_are_named(tmp_path, two):
    again = [text.replace("=", "=", 1) for text in two]
    found = rows.read(settings("base", two, validation_data=again))
    assert any("18 genes are in data and in validation_data" in remark for remark in found.remarks)
    with pytest.raises(InputError, match="sample prompt 1' is a protein"):
        rows.read(settings("base", two, sample_prompts=["MKLE"]))


REFUSED = {
    "mode full trains every weight": {"mode": "full", "init": "pissa"},
    "leave targets as it is": {"mode": "full", "targets": "linear"},
    "an untrained model has nothing to keep frozen": {"base": "new"},
    "must be a multiple of its heads": {"base": "new", "mode": "full", "width": 30},
    "letters would never be read": {"base": "new", "mode": "full", "stride": 4},
    "two labels must differ": {"labels": ["a", "a"]},
    "not from both": {"validation_split": 0.2, "validation_data": ["x.fa"]},
    "leave labels_file empty": {"task": "masked", "labels_file": "x.tsv"},
    "leave sample_prompts empty": {"task": "masked", "sample_prompts": ["ACGT"]},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_configurations_that_are_refused(sentence):
    changes = {"base": "known", **REFUSED[sentence]}
    with pytest.raises(InputError, match=sentence):
        settings(data=["a.fa"], **changes)
