"""``studio inspect``: adapters, checkpoint pairs, forgetting, on a tiny pipeline and a tiny language model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from adapters import formats
from adapters.errors import Cancelled, InputError
from adapters.formats import LoraFile, LoraLayer, write_peft
from adapters.inspection.intruders import Report
from adapters.progress import Silent
from benchmarks import dialects
from studio import jobs, library
from studio.cli import app
from studio.inspection import intruders
from tests import tiny
from tests.language import tiny as language
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


def test_a_slider_knows_the_control_without_the_weights(base, adapter):
    report = intruders.intruders(str(adapter), str(base), k=6, eps=0.6).to_dict()
    for strength in (0.0, 0.75, 1.0, 1.5):
        _, _, facts = intruders.soften(str(adapter), str(base), strength, 6, 0.6)
        assert intruders.shrink_factor(report, 0.6, strength) == pytest.approx(facts["control_factor"], rel=1e-5)


def test_the_jobs_behind_the_page(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "home"))
    asked = {"adapter": str(adapter), "base": str(base), "k": 6}
    old = str(bed.crosses(tmp_path / "old", 2))
    done = jobs.run_here("forgetting", {**asked, "old": old, "strengths": [1.0, 0.5]}, Silent())
    assert [row["variant"] for row in done.result["rows"]] == [
        "base", "adapter", "intruders scaled", "whole update shrunk",
    ]  # fmt: skip
    assert Path(done.result["table"]).read_text().startswith("variant,factor,norm,old\nbase,0.0,0.0,")
    done = jobs.run_here("soften", {**asked, "strength": 0.5}, Silent())
    soft, shrunk = (formats.read(library.resolve_adapter(done.result[key])) for key in ("library", "library_control"))
    assert max(soft.ranks()) > 2
    assert json.loads(soft.metadata["adapter_studio_softened"])["lambda"] == 0.5
    assert shrunk.ranks() == formats.read(adapter).ranks()
    for wrong, sentence in (
        ({"strength": -1}, "lambda must be 0"),
        ({"strength": float("nan")}, "lambda must be 0"),
        ({"eps": 0}, "greater than 0"),
        ({"k": 0}, "greater than or equal to 1"),
        ({"base": ""}, "base"),
    ):
        with pytest.raises(InputError, match=sentence):
            jobs.submit("soften", {**asked, **wrong})
    with pytest.raises(Cancelled):
        jobs.run_here("forgetting", {**asked, "old": old}, Stopped())


class Stopped(Silent):
    """Somebody has pressed Cancel already."""

    def cancelled(self) -> bool:
        return True


def test_pictures_that_are_forgotten(base, adapter, tmp_path):
    rows = intruders.forgetting(
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


def test_gaps_that_are_forgotten(tmp_path):
    """A model that fills gaps is measured on gaps, the same ones every time."""
    base, old = language.bert(tmp_path / "base"), tmp_path / "old.txt"
    old.write_text("a quick brown fox jumps over the lazy dog " * 4)
    g = torch.Generator().manual_seed(3)
    layer = LoraLayer(torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g), 2.0)
    name = "bert.encoder.layer.0.attention.self.query"
    adapter = write_peft(LoraFile({"model": {name: layer}}), tmp_path / "adapter")
    first, second = (intruders.forgetting(str(adapter), str(base), str(old), strengths=(1.0,), k=4) for _ in range(2))
    assert [row.losses for row in first] == [row.losses for row in second]
    assert first[0].losses != first[1].losses


def test_a_pair_of_models(speaker, tmp_path):
    tuned = dialects.model()
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.add_(0.5 * torch.randn(128, 1) @ torch.randn(1, 64))
        tuned.model.embed_tokens.weight.add_(0.01)
    tuned.save_pretrained(tmp_path / "tuned")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tuned" / name).write_bytes((speaker / name).read_bytes())
    report = intruders.intruders(base=str(speaker), tuned=str(tmp_path / "tuned"))
    assert {layer.name for layer in report.layers} == {"model.model.layers.1.mlp.up_proj", "model.model.embed_tokens"}
    with pytest.raises(InputError, match="one adapter, or a tuned model"):
        intruders.intruders(base=str(speaker))


def reports_agree(first, second) -> None:
    """The same layers, counts and cosines (the parts may be called otherwise)."""
    assert len(first.layers) == len(second.layers) > 0
    for one, other in zip(first.layers, second.layers, strict=True):
        assert one.name.partition(".")[2] == other.name.partition(".")[2]
        assert (one.shape, one.rank, one.positions) == (other.shape, other.rank, other.positions)
        assert one.cosines == pytest.approx(other.cosines, abs=2e-4)
        assert one.relative_change == pytest.approx(other.relative_change, rel=1e-4)


def test_files_alone_give_the_pipelines_report(base, adapter, tmp_path):
    whole = intruders.intruders(str(adapter), str(base), k=6)
    reports_agree(whole, intruders.intruders(str(adapter), str(base), k=6, from_files=True))
    unet = formats.read(adapter)
    unet = unet.with_parts({"unet": unet.parts["unet"]}, unet.flat)
    alone = write_peft(unet, tmp_path / "unet-alone")
    of_unet = [layer for layer in whole.layers if layer.name.startswith("unet.")]
    found = intruders.intruders(str(alone), str(base / "unet"), k=6, from_files=True)
    reports_agree(Report(whole.k, whole.eps, whole.side, tuple(of_unet)), found)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_pairs_of_files_give_the_report_of_pairs_of_models(kind, tmp_path):
    """Linear and square Conv1D layers, embeddings: what is changed in the weights is found either way."""
    first, second = (getattr(language, kind)(tmp_path / name) for name in ("first", "second"))
    stored = load_file(second / "model.safetensors")
    g = torch.Generator().manual_seed(1)
    for name, weight in stored.items():
        if weight.ndim == 2:
            weight += 0.3 * torch.randn(len(weight), 1, generator=g) @ torch.randn(1, weight.shape[1], generator=g)
        stored[name] = weight
    save_file(stored, second / "model.safetensors", metadata={"format": "pt"})
    models = intruders.intruders(base=str(first), tuned=str(second), k=4)
    found = intruders.intruders(base=str(first), tuned=str(second), k=4, from_files=True)
    stored_once = {layer.name for layer in found.layers}  # a tied head is its embedding
    reports_agree(replace(models, layers=tuple(one for one in models.layers if one.name in stored_once)), found)
    assert len(found.layers) >= len(models.layers) - 2
    single = intruders.intruders(
        base=str(first / "model.safetensors"), tuned=str(second / "model.safetensors"), k=4, from_files=True
    )
    assert single.total == found.total


def test_an_adapter_of_gpt2s_transposed_layers(tmp_path):
    base = language.gpt2(tmp_path / "base")
    g = torch.Generator().manual_seed(2)
    layer = LoraLayer(torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g), 2.0)
    adapter = write_peft(LoraFile({"model": {"transformer.h.0.attn.c_proj": layer}}), tmp_path / "adapter")
    reports_agree(
        intruders.intruders(str(adapter), str(base)), intruders.intruders(str(adapter), str(base), from_files=True)
    )


def test_files_that_cannot_be_looked_into(base, adapter, tmp_path, capsys):
    for given, sentence in (
        (str(tmp_path), "no weights in .safetensors"),
        ("no/such-model", "not on this computer"),
        (str(base / "model_index.json"), ".safetensors files"),
    ):
        assert app.run(["inspect", "intruders", str(adapter), "--base", given, "--files"]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
    save_file({"unet.weight": torch.zeros(4, 4, dtype=torch.uint8)}, tmp_path / "packed.safetensors")
    with pytest.raises(InputError, match="quantised"):
        intruders.intruders(str(adapter), str(tmp_path / "packed.safetensors"), from_files=True)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a readable safetensors"):
        intruders.intruders(str(adapter), str(tmp_path / "broken.safetensors"), from_files=True)
