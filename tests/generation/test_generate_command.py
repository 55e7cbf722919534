"""``studio generate`` from snapshots on disk to an adapter in the library that PEFT loads on the base."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from adapters.errors import InputError
from adapters.formats import read
from studio import library
from studio.cli.app import run
from studio.generation.schema import GenerateSampleConfig, GenerateTrainConfig
from tests.language import tiny


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)


def test_from_snapshots_to_an_adapter_in_the_library(tmp_path, capsys):
    base = tiny.llama(tmp_path / "base")
    for t, task in enumerate(("sums", "dates")):
        (tmp_path / f"{task}.txt").write_text(f"{task} one\n\n{task} two\n")
        torch.manual_seed(t)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value)
        for i in range(2):
            for value in (value for name, value in model.named_parameters() if "lora_" in name):
                value.data += 0.01 * torch.randn_like(value)
            model.save_pretrained(tmp_path / task / f"step{i}")
    options = [part for task in ("sums", "dates") for part in
               ("--snapshots", f"{task}={tmp_path / task}", "--examples", f"{task}={tmp_path / task}.txt")]  # fmt: skip
    size = ["--steps", "200", "--learning-rate", "0.005", "--hidden", "32"]
    assert run(["generate", "train", *options, "--base", str(base), *size, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tasks"]["sums"]["error"] < told["tasks"]["sums"]["mean_error"]
    assert run(["generate", "sample", told["generator"], "--task", "sums", "--count", "2", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)["library"]
    assert names == ["sums", "sums-2"]
    place = library.resolve_adapter("sums")
    made = read(place)
    assert made.config["base_model_name_or_path"] == str(base)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place)
    weight = dict(loaded.named_parameters())["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"]
    assert torch.equal(weight, made.parts["model"]["model.layers.0.self_attn.q_proj"].B)
    again = ["generate", "sample", told["generator"], "--examples", str(tmp_path / "sums.txt"), "--json"]
    assert run([*again, "--base", str(base), "--name", "by examples"]) == 0
    same = read(library.resolve_adapter("by examples"))
    assert torch.allclose(same.parts["model"]["model.layers.0.self_attn.q_proj"].B, weight)
    assert run([*again, "--base", "other"]) == 2
    assert run(["generate", "sample", told["generator"], "--task", "sum"]) == 2


def test_configurations_that_cannot_be_meant_are_refused():
    for values, message in (
        ({"snapshots": {"a": "a"}}, "'a' needs either"),
        ({"snapshots": {"a": "a"}, "vectors": {"a": "a", "b": "b"}}, "'b' has no snapshots"),
        ({"snapshots": {"a": "a"}, "examples": {"a": "a"}}, "need a base"),
    ):
        with pytest.raises(InputError, match=message):
            GenerateTrainConfig.parse(values)
    with pytest.raises(InputError, match="one of task"):
        GenerateSampleConfig.parse({"generator": "g", "task": "a", "vector": "b"})
