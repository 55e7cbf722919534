"""X-LoRA trained by the language job: adapters of the library stay as they are, a classifier learns, chats stream."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from adapters.errors import Cancelled, InputError
from adapters.layers.experts import xlora
from pipelines.language.adapters import AdaptedModel
from pipelines.language.loading import open_model
from pipelines.language.tokens import Sampling
from studio.library import scan
from studio.training import estimate, ready
from studio.training.tasks.language import run
from tests.language.conftest import Watcher, settings, stream

EXPERTS = {
    "plain": {"r": 2, "target_modules": ["q_proj", "up_proj"]},
    "wide": {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "dora": {"r": 2, "use_dora": True, "target_modules": ["q_proj"]},
}


@pytest.fixture(scope="module")
def experts(bases, tmp_path_factory):
    """Directories of three adapters of the tiny Llama, separated by commas."""
    root, found = tmp_path_factory.mktemp("adapters"), []
    for number, (name, options) in enumerate(EXPERTS.items()):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(bases("llama")), LoraConfig(task_type="CAUSAL_LM", **options)
        )
        torch.manual_seed(number)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(root / name)
        found.append(str(root / name))
    return ",".join(found)


@pytest.fixture(scope="module")
def trained(bases, chats, experts, tmp_path_factory):
    """(configuration, result, watcher) of a run."""
    config = settings(
        bases("llama"), chats, steps=4, method="x-lora", experts=experts, xlora_depth=2, xlora_size=8,
        xlora_layerwise=True, batch_size=2, gradient_accumulation=2, gradient_checkpointing=True,
        sample_prompts=["red1?"], sample_tokens=2,
    )  # fmt: skip
    watcher = Watcher()
    return config, run(config, tmp_path_factory.mktemp("whole"), watcher), watcher


def weights(result):
    return load_file(Path(result["adapter"]) / "adapter_model.safetensors")


def test_a_resumed_run_is_the_uninterrupted_one_and_experts_do_not_change(trained, experts, tmp_path):
    config, whole, watcher = trained
    with pytest.raises(Cancelled):
        run(config, tmp_path / "part", Watcher(stop_at=2))
    first, second = weights(whole), weights(run(config, tmp_path / "part", Watcher(), resume=True))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    key = next(name for name in first if name.endswith("layers.0.self_attn.q_proj.moeadapter_A"))
    files = [load_file(Path(place) / "adapter_model.safetensors") for place in experts.split(",")]
    own = [file[key.replace("moeadapter_A", "lora_A.weight")] for file in files]
    assert torch.equal(first[key], torch.cat(own))
    assert whole["parameters"] == sum(t.numel() for name, t in first.items() if "moeadapter_router" in name)
    gates = [p.metrics for p in watcher.seen if p.stage == "training" and p.metrics]
    assert any({"gate_plain", "gate_wide", "gate_dora"} <= metrics.keys() for metrics in gates)


def test_the_classifier_learns(trained, bases, chats, experts, tmp_path):
    config, _, _ = trained
    changed = config.model_copy(update={"steps": 1, "learning_rate": 0.0, "sample_prompts": []})
    start = weights(run(changed, tmp_path / "start", Watcher()))
    end = weights(trained[1])
    moved = {name for name in end if not torch.equal(start[name], end[name])}
    assert moved == {name for name in end if "moeadapter_router" in name}


def test_peft_and_chats_load_and_stream_it(trained, bases, experts):
    _, result, _ = trained
    opened = open_model(str(bases("llama")))
    ids = torch.tensor([[8, 9, 10, 11]])
    plain = opened.model(ids).logits
    chat = AdaptedModel(opened.model)
    chat.add("mix", Path(result["adapter"]))
    chat.add("lora", Path(experts.split(",")[0]))
    with chat.active({"mix": 1.0}) as model, torch.no_grad():
        answered = model(ids).logits
        pieces = list(stream(model, opened.tokenizer, [{"role": "user", "content": "red1?"}], Sampling(max_tokens=6)))
    assert not torch.equal(answered, plain)
    assert torch.equal(opened.model(ids).logits, plain)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases("llama")).eval(), result["adapter"])
    torch.testing.assert_close(peft(ids).logits, answered, atol=1e-6, rtol=0)
    from pipelines.language.answer import prompt

    inputs = prompt(opened.tokenizer, [{"role": "user", "content": "red1?"}], "cpu")
    whole = peft.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
    text = opened.tokenizer.decode(whole[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "".join(pieces) == text
    with chat.active({"mix": 1.0, "lora": 0.5}) as model:
        assert not torch.equal(model(ids).logits, answered)


def test_the_library_and_the_card_name_the_experts(trained):
    _, result, _ = trained
    record = scan.record(Path(result["adapter"]), "adapter")
    assert record.notes["algorithm"] == "mixture of experts (x-lora)"
    assert record.notes["experts"] == "plain, wide, dora"
    assert record.family == "language"
    assert "Mixes these adapters" in Path(result["card"]).read_text()
    config = json.loads((Path(result["adapter"]) / "adapter_config.json").read_text())
    assert all(len(one["sha256"]) == 64 for one in config["experts"])


def test_experts_of_different_bases_are_said_to_the_person(bases, chats, experts, tmp_path):
    places = [Path(place) for place in experts.split(",")]
    for place in places:
        shutil.copytree(place, tmp_path / place.name)
    file = tmp_path / "wide" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "someone/other"}))
    named = ",".join(str(tmp_path / place.name) for place in places)
    config = settings(bases("llama"), chats, steps=1, method="x-lora", experts=named)
    assert ready.remark(settings(bases("llama"), chats, method="x-lora", experts=experts)) == ""
    assert "'wide' for someone/other): an expert works as trained only on its own." in ready.remark(config)
    assert "The experts name different bases (" in ready.remark(config)
    run(config, tmp_path / "run", watcher := Watcher())
    assert any("'wide' for someone/other)" in report.message for report in watcher.seen)


def test_it_is_estimated(trained):
    config, result, _ = trained
    assert estimate.look_at_language(config, "fp32").learnt == result["parameters"]


def test_what_cannot_be_trained_is_said_before(trained, bases, chats, experts, tmp_path):
    first = experts.split(",")[0]
    for names, message in (("", "name them in experts"), (f"{first},{first}", "name each adapter once"),
                           ("nowhere", "nowhere")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            ready.language(settings(bases("llama"), chats, method="x-lora", experts=names))
    for change, message in (
        ({"use_dora": True}, "are what they are"), ({"experts_per_token": 2}, "xlora_top_k"),
        ({"xlora_softmax": "kept"}, "needs xlora_top_k"), ({"xlora_top_k": 9}, "from 1 to the 3 experts"),
        ({"base": str(bases("wide"))}, "wide|matrix|base"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            run(settings(**{"base": bases("llama"), "data": chats, "method": "x-lora", "experts": experts} | change),
                tmp_path / "no", Watcher())  # fmt: skip


def test_a_copied_model_has_gates_of_its_own(trained, bases):
    import copy

    _, result, _ = trained
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases("llama")).eval(), result["adapter"])
    ids = torch.tensor([[8, 9, 10, 11]])
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in xlora.classifier(other).parameters():
            parameter.zero_()
        found = model(ids).logits
        even = other(ids).logits
    assert torch.allclose(xlora.last_gates(other), torch.full((), 1 / 3))
    with xlora.constant_gates(model, [1 / 3] * 3), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, even, atol=1e-6, rtol=0)
    assert not torch.allclose(found, even, atol=1e-4)


def test_constant_gates_are_converted_without_the_base(trained, bases, tmp_path, capsys):
    from tests.cli.test_lora_files import ask

    _, result, _ = trained
    ids = torch.tensor([[8, 9, 10, 11]])
    out = tmp_path / "one"
    gates = ("--gates", "plain=0.75,wide=-0.5", "--to", "peft", "-o", out)
    assert ask(capsys, "lora", "convert", result["adapter"], *gates)[0] == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases("llama")).eval(), result["adapter"])
    with xlora.constant_gates(model, [0.75, -0.5, 0.0]):
        wanted = model(ids).logits
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases("llama")).eval(), out)
    torch.testing.assert_close(lora(ids).logits, wanted, atol=1e-5, rtol=0)
    for written, message in (("dora=1", "is DoRA"), ("plane=1", "did you mean 'plain'"), ("plain", "EXPERT=GATE")):
        code, _, error = ask(
            capsys, "lora", "convert", result["adapter"], "--gates", written, "-o", tmp_path / "no.safetensors"
        )
        assert (code, message in error) == (2, True), error
