"""``studio inspect``: adapters, checkpoint pairs, forgetting, on a tiny pipeline and a tiny language model."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from adapters import formats
from adapters.errors import InputError
from adapters.formats import LoraFile, LoraLayer, write_peft
from benchmarks import dialects
from studio import inspection
from studio.cli import app
from tests import tiny
from tests.training import bed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.saved("sd", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return tiny.lora_file(tiny.sd(), tmp_path_factory.mktemp("adapter"), strength=3.0)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """Bed T as a transformers directory, with a tokenizer of 32 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("speaker")
    dialects.model().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(dialects.TOKENS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


def test_report_and_picture(base, adapter, tmp_path, capsys):
    picture = tmp_path / "x.png"
    code = app.run(
        ["inspect", "intruders", str(adapter), "--base", str(base), "--k", "6", "--plot", str(picture), "--json"]
    )
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert report["total"] == sum(layer["intruders"] for layer in report["layers"]) > 0
    assert len(report["layers"]) == len(list(formats.read(adapter).layers()))
    with Image.open(picture) as drawn:
        assert drawn.height > 14 * len(report["layers"])


def test_softened_adapter_and_its_control(base, adapter, tmp_path, capsys):
    out, control = tmp_path / "soft.safetensors", tmp_path / "control.safetensors"
    command = ["inspect", "soften", str(adapter), "--base", str(base), "--k", "6", "--lambda", "0.5"]
    assert app.run([*command, "--out", str(out), "--control", str(control), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    soft, shrunk = formats.read(out), formats.read(control)
    assert max(soft.ranks()) > 2
    norms = [sum(layer.delta().square().sum() for _, _, layer in file.layers()).sqrt() for file in (soft, shrunk)]
    assert float(norms[0]) == pytest.approx(found["norm"], rel=1e-3)
    assert float(norms[1]) == pytest.approx(found["norm"], rel=1e-3)
    assert json.loads(soft.metadata["adapter_studio_softened"])["lambda"] == 0.5
    pipe = tiny.sd()
    pipe.load_lora_weights(out)


def test_pictures_that_are_forgotten(base, adapter, tmp_path):
    rows = inspection.forgetting(
        str(adapter), str(base), str(bed.crosses(tmp_path / "old", 2)), strengths=(1.0, 0.0), k=6
    )
    assert [row.variant for row in rows] == ["base", "adapter", "intruders scaled", "whole update shrunk"]
    assert rows[1].losses["old"] != rows[0].losses["old"]
    assert rows[2].norm == pytest.approx(rows[3].norm, rel=1e-3)


def test_text_that_is_forgotten(speaker, tmp_path, capsys):
    ids = dialects.sequences(0, 40, torch.Generator().manual_seed(1)).flatten().tolist()
    (tmp_path / "old.txt").write_text(" ".join(f"w{i}" for i in ids))
    g = torch.Generator().manual_seed(2)
    layer = LoraLayer(torch.randn(2, 64, generator=g), torch.randn(64, 2, generator=g), 2.0)
    write_peft(LoraFile({"model": {"model.layers.0.self_attn.q_proj": layer}}), tmp_path / "adapter")
    command = ["inspect", "forgetting", str(tmp_path / "adapter"), "--base", str(speaker)]
    assert app.run([*command, "--old", str(tmp_path / "old.txt"), "--lambda", "1", "--json"]) == 0
    base, tuned = json.loads(capsys.readouterr().out)
    assert base["old"] < tuned["old"]
    assert app.run([*command, "--old", str(tmp_path)]) == 2
    assert "text file" in capsys.readouterr().err


def test_a_pair_of_models(speaker, tmp_path):
    tuned = dialects.model()
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.add_(0.5 * torch.randn(128, 1) @ torch.randn(1, 64))
        tuned.model.embed_tokens.weight.add_(0.01)
    tuned.save_pretrained(tmp_path / "tuned")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tuned" / name).write_bytes((speaker / name).read_bytes())
    report = inspection.intruders(base=str(speaker), tuned=str(tmp_path / "tuned"))
    assert {layer.name for layer in report.layers} == {"model.model.layers.1.mlp.up_proj", "model.model.embed_tokens"}
    with pytest.raises(InputError, match="one adapter, or a tuned model"):
        inspection.intruders(base=str(speaker))
