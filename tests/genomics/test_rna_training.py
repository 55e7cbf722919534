"""Training k-mer models: equal to stock PEFT and transformers, exact resume, ordinary files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

import studio
from adapters.errors import Cancelled, InputError
from pipelines.genomics import fasta
from pipelines.genomics.classifier import RnaClassifier
from pipelines.genomics.kmers import Kmers
from pipelines.genomics.task_file import RnaTask
from studio import library
from studio.cli.app import run as command
from studio.datasets.seeds import global_seed
from studio.training.drivers.trainer import RunSampler
from studio.training.optimizers import lr_factor
from studio.training.rna import rows, samples
from studio.training.tasks.rna import run
from tests.genomics.conftest import letters, save, settings, write_fasta
from tests.language.conftest import Watcher

WHOLE = ("pooler", "classifier")


def weights(result: dict) -> dict[str, torch.Tensor]:
    place = Path(result["adapter"])
    return load_file(next(place.glob("*.safetensors")))


def stock_loop(model, config, kmers: Kmers, seed_rows) -> list[float]:
    """A training loop written out: the losses of every step."""
    order = list(RunSampler(len(seed_rows), config.steps * config.batch_size, config.seed))
    parts = [
        [p for n, p in model.named_parameters() if p.requires_grad and part(n)]
        for part in (lambda n: "lora_A" in n, lambda n: "lora_B" in n, lambda n: "lora_" not in n)
    ]
    optimizer = torch.optim.AdamW([{"params": part} for part in parts if part], lr=1e-2, weight_decay=0)
    losses = []
    for step in range(config.steps):
        batch = [seed_rows[n] for n in order[step * config.batch_size : (step + 1) * config.batch_size]]
        size = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [0] * (size - len(row["input_ids"])) for row in batch])
        labels = torch.tensor([row["labels"][0] for row in batch])
        loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * lr_factor(step, config.steps, config)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def learnt_rows(config, kmers: Kmers) -> list:
    found, _ = samples.rows(rows.read(config).shown, kmers, config)
    return samples.balanced(found)


# ------------------------------------------------------------------------------------------------ rows


def test_rows_are_whole_transcripts_and_orfs_of_both_labels_equally_often(masked, two):
    config = settings(masked, two)
    kmers, read = Kmers.read(masked, 64), rows.read(config)
    found, remarks = samples.rows(read.shown, kmers, config)
    coding = [item for item in read.shown if item.label == 0]
    assert sum(row["labels"] == [0] for row in found) == 2 * len(coding)  # each has an ORF of 100 nt or more
    assert "are longer than the 64 nt of one input" in remarks[0]
    even = samples.balanced(found)
    assert sum(row["labels"] == [0] for row in even) == sum(row["labels"] == [1] for row in even)
    only, said = samples.rows(read.shown, kmers, settings(masked, two, view="orf"))
    assert len(only) == len(found) - len(read.shown)
    assert any("have no ORF of 100 nt and are not learnt" in one for one in said)
    frames, _ = samples.rows(read.shown[:1], Kmers.new(3, 3, 64), settings(masked, two, view="full"))
    assert len(frames) == 3
    pieces, _ = samples.rows(read.shown[:1], kmers, settings(masked, two, view="full", long="windows"))
    assert len(pieces) > 1


# ------------------------------------------------------------------------------------------------ the two modes


def test_lora_is_plain_peft_with_pooler_and_classifier(masked, two, tmp_path):
    """Four steps of a loop written out here; at the start the adapter changes nothing; only it and the head learn."""
    config, watcher = settings(masked, two), Watcher()
    result = run(config, tmp_path / "run", watcher)
    kmers = Kmers.read(masked, 64)
    with global_seed(config.seed, "head"):
        model = AutoModelForSequenceClassification.from_pretrained(masked, num_labels=2)
    names = [n for n, _ in model.named_modules() if n.endswith((".query", ".value"))]
    with global_seed(config.seed, "init"):
        peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=names, task_type="SEQ_CLS",
                                                modules_to_save=list(WHOLE)))  # fmt: skip
    start = torch.tensor([kmers.encode(letters(60, 1))])
    peft.eval()
    with torch.no_grad(), peft.disable_adapter():
        base = peft(input_ids=start).logits
    assert torch.equal(peft(input_ids=start).logits, base)  # B = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    no_dropout = save_without_dropout(masked, tmp_path / "still")
    again = run(settings(no_dropout, two), tmp_path / "again", quiet := Watcher())
    losses = stock_loop(peft.train(), config, kmers, learnt_rows(config, kmers))
    assert quiet.losses == pytest.approx(losses, rel=1e-4)
    assert len(watcher.losses) == 4
    state = {n.replace(".default", ""): p for n, p in peft.named_parameters() if p.requires_grad}
    state = {n.replace(".modules_to_save", ""): p for n, p in state.items()}
    made = weights(again)
    assert made.keys() == state.keys()
    assert all("lora_" in n or any(part in n for part in WHOLE) for n in made)
    for name, tensor in made.items():
        assert torch.allclose(tensor, state[name], atol=1e-4), name
    assert result["parameters"] == sum(p.numel() for p in state.values())
    assert result["layers"] == {"model": "4 of 16 linear layers (25%)"}


def save_without_dropout(base: Path, place: Path) -> Path:
    """The same weights with dropout 0 in the configuration."""
    import shutil

    shutil.copytree(base, place)
    told = json.loads((place / "config.json").read_text())
    told |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (place / "config.json").write_text(json.dumps(told))
    return place


def test_full_is_plain_transformers(masked, two, tmp_path):
    still = save_without_dropout(masked, tmp_path / "still")
    config, watcher = settings(still, two, mode="full"), Watcher()
    result = run(config, tmp_path / "run", watcher)
    with global_seed(config.seed, "head"):
        model = AutoModelForSequenceClassification.from_pretrained(still, num_labels=2)
    kmers = Kmers.read(masked, 64)
    losses = stock_loop(model.train(), config, kmers, learnt_rows(config, kmers))
    assert watcher.losses == pytest.approx(losses, rel=1e-4)
    made = AutoModelForSequenceClassification.from_pretrained(result["adapter"])
    for (name, ours), theirs in zip(made.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4), name
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["layers"]["model"].startswith("14 of 14 linear layers (100%)")


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_what_is_saved_is_ordinary_and_classifies(masked, two, tmp_path, mode):
    """Stock PEFT or transformers load it, with the stock tokenizer; our classifier gives the same probabilities."""
    result = run(settings(masked, two, mode=mode, validation_split=0.3, steps=3), tmp_path / "run")
    place = Path(result["adapter"])
    if mode == "lora":
        torch.manual_seed(5)
        stock = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(masked), place)
        ours, told = RnaClassifier.open(masked, place), masked
    else:
        stock, ours, told = AutoModelForSequenceClassification.from_pretrained(place), RnaClassifier.open(place), place
        assert stock.config.id2label == {0: "mRNA", 1: "lncRNA"}
    assert ours.task.labels == ("mRNA", "lncRNA")
    tokenizer = AutoTokenizer.from_pretrained(told)
    record = fasta.Record("r", "r", letters(90, 3), 1)
    words = " ".join(record.sequence[i : i + 3] for i in range(88))
    with torch.no_grad():
        given = tokenizer(words, return_tensors="pt", truncation=True, max_length=64)
        share = stock.eval()(**given).logits.softmax(-1)[0]
    [score] = ours.score([record])
    assert 1 / (1 + torch.tensor(-score.full).exp()) == pytest.approx(float(share[1]), abs=1e-5)
    assert float(share.sum()) == pytest.approx(1.0)
    measured = result["validation"][-1]
    assert {"roc_auc", "pr_auc", "mcc", "balanced_accuracy", "roc_auc_of_orf_length"} <= set(measured)
    report = json.loads(Path(result["report"]).read_text())
    assert report["measures"]["roc_auc"] == measured["roc_auc"]
    assert set(report["by_label"]) == {"mRNA", "lncRNA"}
    card = (place / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained(" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    code = code.replace("base = 'base'  # the folder of the base model", f"base = {str(masked)!r}")
    exec(compile(code.replace('"."', repr(str(place))), "card", "exec"), {})


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_stopped_and_resumed_is_the_uninterrupted_run(masked, two, tmp_path, mode):
    changes = {} if mode == "full" else {"dropout": 0.2}
    config = settings(masked, two, mode=mode, steps=5, gradient_accumulation=2, validation_split=0.3,
                      validation_every=2, **changes)  # fmt: skip
    whole = run(config, tmp_path / "whole", Watcher())
    with pytest.raises(Cancelled, match="step 3 of 5"):
        run(config, tmp_path / "part", Watcher(stop_at=3))
    resumed = run(config, tmp_path / "part", Watcher(), resume=True)
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole["validation"] == resumed["validation"]


# ------------------------------------------------------------------------------------------------ hidden k-mers


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_masked_learns_and_loads_in_stock(masked, two, tmp_path, mode):
    data = [text.partition("=")[2] for text in two]
    result = run(settings(masked, data, mode=mode, task="masked", steps=16, batch_size=8, validation_split=0.2),
                 tmp_path / "run")  # fmt: skip
    assert mode == "lora" or result["loss"] < result["first_loss"]  # under random weights an adapter learns slowly
    assert result["validation"][-1]["perplexity"] < 100
    place = Path(result["adapter"])
    if mode == "lora":
        PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(masked), place)
    else:
        _, report = AutoModelForMaskedLM.from_pretrained(place, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]


def test_from_nothing_to_a_classifier(two, tmp_path):
    """A new model learns hidden 4-mers, every second letter; a LoRA on it; the library knows both as RNA."""
    data = [text.partition("=")[2] for text in two]
    base = studio.train(
        "rna", folder=tmp_path / "base", base="new", mode="full", task="masked", k=4, stride=2, width=16, depth=1,
        heads=2, max_length=40, data=data, steps=3, device="cpu", name="fourmers",
    )  # fmt: skip
    told = Kmers.read(Path(base["adapter"]), 40)
    assert (told.k, told.stride, len(told)) == (4, 2, 261)
    kept = library.import_base(base["adapter"], "fourmers")
    assert kept.family == "rna"
    made = run(settings("fourmers", two, name="tells"), tmp_path / "run")
    adapter = library.import_adapter(made["adapter"], "tells")
    assert adapter.family == "rna"
    ours = RnaClassifier.open(kept.path, adapter.path)
    assert (ours.kmers.k, ours.kmers.stride, ours.kmers.longest) == (4, 2, 40)


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("changes", [
    {"init": "pissa", "grad_rule": "allora", "alpha": 2}, {"perturb": "mgpo", "targets": "linear"},
    {"init": "lora_ga", "reg": "ba", "perturb": "ggpo", "init_batches": 2, "targets": "attention"},
    {"method": "mola"},
])  # fmt: skip
def test_methods_of_the_studio(masked, two, tmp_path, changes):
    """Each trains with a finite loss, and what is saved gives the probabilities of the trained model."""
    config = settings(masked, two, steps=3, validation_split=0.3, **changes)
    result = run(config, tmp_path / "run")
    ours = RnaClassifier.open(masked, Path(result["adapter"]))
    held = rows.read(config).held_out
    scores = ours.score([item.record for item in held])
    report = json.loads(Path(result["report"]).read_text())
    from studio.training.rna.report import Judged

    again = Judged.of(scores, [item.label for item in held]).measures(0.5)
    assert again["validation_loss"] == pytest.approx(report["measures"]["validation_loss"], abs=1e-5)


def test_longer_inputs(masked, two, tmp_path):
    with pytest.raises(InputError, match="more than the 64 positions the base has learnt"):
        run(settings(masked, two, max_length=80), tmp_path / "a")
    made = run(settings(masked, two, max_length=80, train_positions=True), tmp_path / "b")
    assert any("position_embeddings" in name for name in weights(made))
    ours = RnaClassifier.open(masked, Path(made["adapter"]))
    record = fasta.Record("r", "r", letters(200, 3), 1)
    torch.manual_seed(1)
    longer = AutoModelForSequenceClassification.from_pretrained(
        masked, num_labels=2, max_position_embeddings=80, ignore_mismatched_sizes=True
    )
    stock = PeftModel.from_pretrained(longer, made["adapter"]).eval()
    with torch.no_grad():
        first, second = stock(input_ids=torch.tensor([ours.kmers.encode(record.sequence)])).logits[0].tolist()
    assert ours.score([record])[0].full == pytest.approx(second - first, abs=1e-5)
    full = run(settings(masked, two, mode="full", max_length=80), tmp_path / "c")
    assert RnaTask.read(Path(full["adapter"])).max_length == 80


def test_an_adapter_is_continued_with_its_head(masked, two, tmp_path):
    first = run(settings(masked, two), tmp_path / "a")
    again = run(settings(masked, two, continue_from=first["adapter"], steps=1, learning_rate=1e-9, alpha=8),
                tmp_path / "b")  # fmt: skip
    before, after = weights(first), weights(again)
    for name in before:  # alpha is doubled, so that B is halved
        assert torch.allclose(before[name], after[name] * (2 if "lora_B" in name else 1), atol=1e-6), name
    with pytest.raises(InputError, match="has other layers or another rank"):
        run(settings(masked, two, continue_from=first["adapter"], rank=3), tmp_path / "d")
    other = save(tmp_path / "other", type(AutoModelForMaskedLM.from_pretrained(masked)), seed=8)
    with pytest.raises(InputError, match="trained on other weights"):
        run(settings(other, two, continue_from=first["adapter"]), tmp_path / "c")


def test_bases_that_are_refused(two, tmp_path):
    from tests.language import tiny

    with pytest.raises(InputError, match="is no k-mer model of RNA"):
        run(settings(tiny.bert(tmp_path / "words"), two), tmp_path / "run")


def test_the_command(masked, two, tmp_path, capsys):
    """--estimate counts what the run then trains; a bad file ends with one sentence and exit code 2."""
    flags = [part for text in two for part in ("--data", text)]
    asked = ["train", "rna", "--base", str(masked), *flags, "--device", "cpu", "--steps", "2", "--rank", "2", "--json"]
    assert command([*asked, "--estimate"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert command([*asked, "--quiet", "--name", "tells", "--validation-split", "0.3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert told["memory"]["adapter"] == 8 * result["parameters"]
    assert library.find("tells").family == "rna"
    assert command([*asked, "--mode", "full", "--rank", "8", "--quiet", "--name", "whole"]) == 0
    capsys.readouterr()
    assert library.find("whole", "base").family == "rna"
    bad = write_fasta(tmp_path / "bad.fa", {"a": "MKVLEQ" * 30})
    assert command(["train", "rna", "--base", str(masked), "--data", f"mRNA={bad}"]) == 2
    assert "line 1: 'a' is a protein" in capsys.readouterr().err
