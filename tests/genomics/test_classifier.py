"""Checkpoints, scores and their invariants, against stock transformers and PEFT."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from adapters.errors import FamilyError, InputError
from pipelines.genomics import metrics, scoring
from pipelines.genomics.classifier import RnaClassifier
from pipelines.genomics.fasta import Record
from pipelines.genomics.kmers import Kmers
from pipelines.genomics.model import encoder_digest, new_model, open_base
from pipelines.genomics.orf import longest_orf
from pipelines.genomics.task_file import RnaTask
from tests.genomics.conftest import letters, save


def records(count: int) -> list[Record]:
    return [Record(f"r{n}", f"r{n}", letters(100 + 17 * n, n), n + 1) for n in range(count)]


def adapter(base, folder, task: RnaTask | None = None, seed: int = 3):
    """A random adapter of stock PEFT, with pooler and classifier."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], task_type="SEQ_CLS",
                        modules_to_save=["pooler", "classifier"], init_lora_weights=False)  # fmt: skip
    made = get_peft_model(model, config)
    made.save_pretrained(folder)
    if task:
        task.write(folder)
    return folder


# ------------------------------------------------------------------------------------------------ checkpoints


def test_the_papers_model_has_its_size():
    with torch.device("meta"):
        made = new_model(Kmers.new(3, 1, 1536), "classification", labels=("mRNA", "lncRNA")).model
    count = sum(p.numel() for p in made.parameters())
    assert count == pytest.approx(86.9e6, rel=0.001)  # 31 tokens fewer than the paper's vocabulary of 100


def test_checkpoints_as_dnabert_published_them(tmp_path):
    """No model_type, weights in pytorch_model.bin, more keys in the configuration, 6-mers."""
    folder = save(tmp_path / "dnabert", BertForMaskedLM, k=6)
    stock = AutoModelForMaskedLM.from_pretrained(folder)
    torch.save(stock.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("model_type", "dtype", "transformers_version")}
    config |= {"split": 10, "num_rnn_layer": 1, "rnn": "lstm", "rnn_dropout": 0.0, "rnn_hidden": 768}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "max_len": 512}')
    opened = open_base(folder, "masked")
    assert (opened.kmers.k, opened.kmers.stride, opened.kmers.longest) == (6, 1, 64)
    ids = torch.tensor([opened.kmers.encode(letters(60, 0))])
    with torch.no_grad():
        assert torch.equal(opened.model(input_ids=ids).logits, stock.eval()(input_ids=ids).logits)
    classifier = open_base(folder, "classification", labels=("mRNA", "lncRNA"))
    assert set(classifier.fresh) == {"bert.pooler.dense", "classifier"}
    assert encoder_digest(classifier.model) == encoder_digest(opened.model)


def test_weights_with_code_in_them_are_not_run(tmp_path):
    import pickle

    folder = save(tmp_path / "evil", BertForMaskedLM)
    (folder / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
    with pytest.raises(InputError, match="holds more than tensors"):
        open_base(folder, "masked")


def test_longer_positions_keep_what_was_learnt(masked):
    short, longer = open_base(masked, "masked"), open_base(masked, "masked", longest=100)
    ids = torch.tensor([short.kmers.encode(letters(60, 1))])
    with torch.no_grad():
        assert torch.allclose(short.model(input_ids=ids).logits, longer.model(input_ids=ids).logits, atol=1e-6)
        longer.model(input_ids=torch.tensor([longer.kmers.encode(letters(200, 1))]))
    assert longer.kmers.longest == longer.model.config.max_position_embeddings == 100


# ------------------------------------------------------------------------------------------------ scores


def test_scores_are_stock_logits_whatever_the_batch(classified):
    """Of each reading alone, unpadded, by transformers; our scores in batches of any size are the same to 1e-5."""
    opened = open_base(classified, "classification")
    task, rows = RnaTask(3, 1, 64), records(9)
    stock = AutoModelForSequenceClassification.from_pretrained(classified).eval()

    def margin(sequence: str) -> float:
        with torch.no_grad():
            first, second = stock(input_ids=torch.tensor([opened.kmers.encode(sequence)])).logits[0].tolist()
        return second - first

    alone = scoring.score(opened.model, opened.kmers, task, rows, most=1)
    together = list(scoring.stream(opened.model, opened.kmers, task, iter(rows), chunk=4))
    for row, one, other in zip(rows, alone, together, strict=True):
        frame = longest_orf(row.sequence)
        assert one.full == pytest.approx(margin(row.sequence), abs=1e-5)
        assert other.full == pytest.approx(one.full, abs=1e-5)
        if frame:
            assert other.orf == pytest.approx(margin(frame.of(row.sequence)), abs=1e-5)
            assert other.margin == pytest.approx((one.full + one.orf) / 2, abs=1e-5)
        assert other.probability == pytest.approx(1 / (1 + math.exp(-other.margin)))
        assert other.cut == (len(row.sequence) > opened.kmers.reach)


def test_windows_cover_a_long_transcript(classified):
    opened = open_base(classified, "classification")
    for stride, length in ((1, 400), (3, 1000), (1, 64), (1, 65), (1, 10)):
        kmers = Kmers.new(3, stride, 64)
        sequence = letters(length, 5)
        pieces = scoring.windows(kmers, sequence, "windows")
        assert all(2 < len(piece) <= 64 for piece in pieces)
        assert kmers.decode(pieces[-1])[-3:] == sequence[(length - kmers.k) // stride * stride :][:3] or stride > 1
        covered = sum(len(piece) - 2 for piece in pieces)
        assert covered >= len(kmers.tokens(sequence)) - stride
    task = RnaTask(3, 1, 64, view="full", long="windows")
    [found] = scoring.score(opened.model, opened.kmers, task, [Record("a", "a", letters(400, 5), 1)])
    ids = [torch.tensor([piece]) for piece in scoring.windows(opened.kmers, letters(400, 5), "windows")]
    with torch.no_grad():
        each = [opened.model(input_ids=one).logits[0] for one in ids]
    mean = torch.stack(each).mean(0)
    assert found.full == pytest.approx(float(mean[1] - mean[0]), abs=1e-5)


def test_an_orf_alone_is_not_guessed(classified):
    opened = open_base(classified, "classification")
    none = Record("none", "none", "CCC" * 50, 1)
    [found] = scoring.score(opened.model, opened.kmers, RnaTask(3, 1, 64, view="orf"), [none])
    assert found.probability is None
    [found] = scoring.score(opened.model, opened.kmers, RnaTask(3, 1, 64), [none])
    assert found.margin == found.full


def test_what_is_no_number_is_unknown_and_reports_stay_json(tmp_path):
    """NaN margins are neither a label nor a NaN in a file; nothing read is null, not a failure."""
    from studio.genomics import table
    from studio.training.rna.report import Judged

    record, task = Record("a", "a", letters(300, 5), 1), RnaTask(3, 1, 64)
    broken = scoring.Score(record, math.nan, math.nan, None, 0.5, False)
    assert broken.probability is None
    cells = table.row(broken, task, 0.5)
    assert "nan" not in cells
    assert cells[-1] == table.NO_NUMBER
    summary = table.Summary(task.labels)
    summary.add(cells)
    assert (summary.unknown, summary.unread, summary.counts) == (1, 0, {})
    assert summary.remarks() == [f"1 transcripts have no label: {table.NO_NUMBER}"]
    none = scoring.Score(record, None, None, None, 0.5, False)
    judged = Judged.of([none, broken], [0, 1])
    assert judged.measures(0.5) == {}
    report = json.loads(json.dumps(judged.report(task.labels, 0.5, 0), allow_nan=False))
    assert (report["transcripts"], report["not_read"], report["measures"]) == (0, 2, None)
    some = Judged.of([broken, replace(none, full=1.0), replace(none, full=-1.0)], [0, 1, 0])
    json.dumps(some.report(task.labels, 0.5, 0), allow_nan=False)


# ------------------------------------------------------------------------------------------------ adapters


def test_an_adapter_scores_as_in_stock_peft(masked, tmp_path):
    digest = encoder_digest(open_base(masked, "masked").model)
    place = adapter(masked, tmp_path / "a", RnaTask(3, 1, 48, ("coding", "long"), "full", base=digest))
    ours = RnaClassifier.open(masked, place)
    torch.manual_seed(9)
    stock = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(masked), place).eval()
    for score in ours.score(records(5)):
        ids = torch.tensor([ours.kmers.encode(score.record.sequence)])
        with torch.no_grad():
            first, second = stock(input_ids=ids).logits[0].tolist()
        assert score.full == pytest.approx(second - first, abs=1e-5)
        assert ours.label(score) == ("long" if second > first else "coding")
    assert ours.kmers.longest == 48


def test_bases_that_do_not_belong_to_an_adapter(masked, classified, tmp_path):
    digest = encoder_digest(open_base(masked, "masked").model)
    place = adapter(masked, tmp_path / "a", RnaTask(3, 1, 64, base=digest))
    with pytest.raises(InputError, match="trained on other weights"):
        RnaClassifier.open(classified, place)
    with pytest.raises(InputError, match="reads 3-mers, the base 'four' 4-mers"):
        RnaClassifier.open(save(tmp_path / "four", BertForMaskedLM, k=4), place)
    with pytest.raises(InputError, match="reads 64 tokens, the base 'short' at most 32"):
        RnaClassifier.open(save(tmp_path / "short", BertForMaskedLM, positions=32), place)
    with pytest.raises(InputError, match="it has no classifier"):
        RnaClassifier.open(masked)
    wide = save(tmp_path / "wide", BertForSequenceClassification, num_labels=3)
    with pytest.raises(InputError, match="tells 3 classes apart"):
        RnaClassifier.open(wide)
    (place / "rna_task.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        RnaClassifier.open(masked, place)
    (place / "rna_task.json").unlink()
    found = RnaClassifier.open(masked, place)
    assert "no rna_task.json" in found.remarks[0]
    broken = json.loads((place / "adapter_config.json").read_text()) | {"target_modules": ["nothing"]}
    (place / "adapter_config.json").write_text(json.dumps(broken))
    with pytest.raises(FamilyError, match="does not fit"):
        RnaClassifier.open(masked, place)


def test_a_checkpoint_of_transformers_alone_is_read_as_the_paper(classified):
    found = RnaClassifier.open(classified)
    assert found.task.labels == ("mRNA", "lncRNA")
    assert "label 0 is taken as mRNA, 1 as lncRNA" in found.remarks[0]


# ------------------------------------------------------------------------------------------------ measures


def test_measures_by_hand():
    truth, shown = [0, 0, 0, 1, 1], [0.1, 0.6, 0.2, 0.9, 0.4]
    found = metrics.measures(truth, shown)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["roc_auc"] == pytest.approx(5 / 6)
    assert metrics.by_label(truth, shown)[1] == {name: pytest.approx(1 / 2) for name in ("precision", "recall", "f1")}
    assert found["mcc"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(2 * 2 * 3 * 3))
    assert "roc_auc" not in metrics.measures([1, 1], [0.2, 0.8])
    low, high = metrics.interval(np.array([0, 1] * 40), np.linspace(0, 1, 80))
    assert low < metrics.area([0, 1] * 40, np.linspace(0, 1, 80)) < high
    parts = metrics.by_length([0, 1] * 8, [0.3, 0.7] * 8, range(16))
    assert [(first, last) for first, last, _ in parts] == [(0, 3), (4, 7), (8, 11), (12, 15)]
