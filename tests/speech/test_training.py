"""Speech trainings on a tiny Whisper: data, batches, runs of every adapter, resume, files in stock PEFT, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from adapters.errors import InputError
from adapters.progress import Cancelled, Progress, Silent
from pipelines.speech.loading import open_model
from pipelines.speech.transcribe import features_of
from studio.datasets import utterances as data
from studio.library import scan
from studio.training import ready
from studio.training.schemas.speech import TrainSpeechConfig
from studio.training.tasks import speech
from tests.speech import tiny

pytest.importorskip("av")


def settings(base: Path, rows: Path, **changes: Any) -> TrainSpeechConfig:
    values: dict[str, Any] = {
        "base": str(base), "data": str(rows), "device": "cpu", "rank": 2, "steps": 4, "batch_size": 2,
        "sample_every": 0, "save_every": 0, "checkpoint_every": 2, "name": "voice", "learning_rate": 1e-2,
    }  # fmt: skip
    return TrainSpeechConfig.parse(values | changes)


def logits(base, model) -> torch.Tensor:
    given = features_of(base, [tiny.tone(1.0)])["input_features"]
    with torch.no_grad():
        return model.eval()(input_features=given, decoder_input_ids=torch.tensor([base.prefix()])).logits


# ---------------------------------------------------------------- data


def test_a_folder_uses_or_names_every_file(tmp_path):
    for name in ("a.wav", "deep/b.wav", "c.wav"):
        tiny.write_wav(tmp_path / name, tiny.tone(0.1))
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "deep" / "b.txt").write_text("two")
    (tmp_path / "alone.txt").write_text("nothing")
    report = data.scan(str(tmp_path))
    assert [row.values["text"] for row in report.rows] == ["one", "two"]
    assert "'c.wav' has no text beside it" in next(iter(report.broken.values()))
    assert "alone.txt" in report.remarks[0]
    (tmp_path / "metadata.csv").write_text("file_name,sentence,speaker\na.wav,One.,x\nc.wav,Three.,y\n")
    report = data.scan(str(tmp_path))
    found = data.utterances(report)
    assert [(item.name, item.text) for item in found] == [("a.wav", "One."), ("c.wav", "Three.")]
    assert any("deep/b.wav" in remark for remark in report.remarks)
    assert any("speaker" in remark for remark in report.remarks)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [({"audio": "none.wav", "text": "a"}, "no sound 'none.wav'"), ({"audio": "a.wav", "text": " "}, "'text' is empty"),
     ({"audio": "", "text": "a"}, "has no sound"), ({"sounds": "a.wav"}, "needs 'audio' and 'text'")],
)  # fmt: skip
def test_rows_that_cannot_be_learnt_are_refused_by_number(row, sentence, tmp_path, whisper):
    tiny.write_wav(tmp_path / "a.wav", tiny.tone(0.1))
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=sentence):
        ready.speech(settings(whisper, file))


def test_a_batch_learns_the_text_and_its_end_but_no_prefix_and_no_padding(multilingual, tmp_path):
    base = open_model(multilingual)
    prefix = base.prefix("en")
    sound = tiny.write_wav(tmp_path / "s.wav", tiny.tone(0.3))
    items = [data.Utterance(1, sound, "a"), data.Utterance(2, sound, "abc")]
    end = base.tokenizer.eos_token_id
    samples = [
        {"item": item, "input_ids": [*base.tokenizer(f" {item.text}", add_special_tokens=False).input_ids, end]}
        for item in items
    ]
    batch = speech.Collate(base, prefix)(samples)
    assert batch["decoder_input_ids"].shape == batch["labels"].shape
    for row, sample in enumerate(samples):
        ids = sample["input_ids"]
        learnt = batch["labels"][row][batch["labels"][row] != -100].tolist()
        assert learnt == ids
        read = batch["decoder_input_ids"][row][: len(prefix) + len(ids) - 1].tolist()
        assert read == [*prefix, *ids[:-1]]
        assert batch["labels"][row][: len(prefix) - 1].tolist() == [-100] * (len(prefix) - 1)


# ---------------------------------------------------------------- runs

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "s2-lora": {"s2_share": "shape", "s2_sparsity": 0.1},
    "s2-lora in blocks": {"s2_share": "blocks", "targets": "attention"},
    "adalora": {"adalora_rank": 1, "rank": 3, "steps": 8, "checkpoint_every": 0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_exactly_and_its_file_is_the_same_model_in_stock_peft(kind, whisper, utterances, tmp_path):
    values = {"validation_split": 0.25, **KINDS[kind]}
    config = settings(whisper, utterances, **values)
    whole = speech.run(config, tmp_path / "whole")
    steps = [found["step"] for found in whole["validation"]]
    recipe = scan.record(Path(whole["adapter"]), "adapter").recipe
    assert recipe is not None
    assert recipe["data"]["seconds"] == 6.0  # those learnt from, without those held out
    assert steps == [0, config.steps]
    assert {"validation_loss", "wer", "cer", "loops"} <= whole["validation"][0].keys()

    class Stopping(Silent):
        def __init__(self) -> None:
            self.step = 0

        def report(self, progress: Progress) -> None:
            self.step = progress.step if progress.stage == "training" else self.step

        def cancelled(self) -> bool:
            return self.step >= 2

    with pytest.raises(Cancelled):
        speech.run(config, tmp_path / "parts", Stopping())
    parts = speech.run(config, tmp_path / "parts", resume=True)
    files = [load_file(Path(run["adapter"]) / "adapter_model.safetensors") for run in (whole, parts)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    loaded = open_model(whisper)
    base = logits(loaded, loaded.model)
    model = PeftModel.from_pretrained(loaded.model, whole["adapter"])
    assert not torch.equal(logits(loaded, model), base)
    record = scan.record(Path(whole["adapter"]), "adapter")
    assert (record.family, record.problem) == ("speech", "")
    card = (Path(whole["adapter"]) / "README.md").read_text()
    assert "AutoModelForSpeechSeq2Seq" in card
    assert "A speech adapter trained on 6 rows" in card
    if kind.startswith("s2"):
        assert (Path(whole["adapter"]) / "s2_weights.safetensors").is_file()
        assert json.loads((Path(whole["adapter"]) / "s2_config.json").read_text())["r"] == 2


def test_samples_are_written_down_and_checkpointing_changes_nothing(whisper, utterances, tmp_path):
    plain = speech.run(settings(whisper, utterances, sample_at_start=True), tmp_path / "plain")
    lines = [json.loads(line) for line in Path(plain["answers"]).read_text().splitlines()]
    assert {line["step"] for line in lines} == {0, 4}
    assert lines[0]["expected"] == "one"
    saved = speech.run(settings(whisper, utterances, gradient_checkpointing=True), tmp_path / "less")
    files = [load_file(Path(run["adapter"]) / "adapter_model.safetensors") for run in (plain, saved)]
    for name, tensor in files[0].items():
        torch.testing.assert_close(files[1][name], tensor)
    assert any("encoder" in name and tensor.any() for name, tensor in files[1].items() if "lora_B" in name)


def test_what_does_not_fit_the_model_is_refused_or_left_out(whisper, utterances, tmp_path):
    tiny.write_wav(tmp_path / "sounds" / "long.wav", tiny.tone(2.5))
    tiny.write_wav(tmp_path / "sounds" / "short.wav", tiny.tone(0.5))
    (tmp_path / "sounds" / "broken.wav").write_bytes(b"RIFF nothing")
    rows = [{"audio": "sounds/short.wav", "text": "a"}]
    cases = [
        ({"audio": "sounds/long.wav", "text": "a"}, "2.5 s long, and the model hears 2 s"),
        ({"audio": "sounds/short.wav", "text": "a" * 90}, "tokens, and the model writes 64"),
        ({"audio": "sounds/broken.wav", "text": "a"}, "Recording 2 .'broken.wav'.: The sound of"),
    ]
    for number, (row, sentence) in enumerate(cases):
        file = tmp_path / f"rows{number}.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in (*rows, row)))
        with pytest.raises(InputError, match=sentence):
            speech.run(settings(whisper, file), tmp_path / "run")
        done = speech.run(settings(whisper, file, too_long="skip", skip_broken=True, steps=1), tmp_path / "run")
        assert done["steps"] == 1
    with pytest.raises(InputError, match="knows English only"):
        speech.run(settings(whisper, utterances, language="fr"), tmp_path / "run")
    with pytest.raises(InputError, match="Rank 17"):
        speech.run(settings(whisper, utterances, rank=17), tmp_path / "run")
