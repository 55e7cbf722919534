"""Mixtures of experts trained by the language job: they learn, resume exactly, reload in PEFT, and answer in chats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from adapters import formats
from adapters.errors import Cancelled, InputError
from adapters.layers.experts import MoeConfig, expert_layers
from adapters.layers.experts.presets import preset
from adapters.layers.experts.size import size
from adapters.layers.experts.trainer import MoeTrainerMixin
from pipelines.language.adapters import AdaptedModel
from studio.library import scan
from studio.training import estimate as estimates
from studio.training.drivers import accelerate
from studio.training.language.layers import add_adapter
from studio.training.optimizers import parameter_groups
from studio.training.schemas.image import TrainImageConfig
from studio.training.session import TrainSession
from studio.training.tasks.language import run, task_for
from tests.language.conftest import Watcher, settings, write_rows

METHODS = ("mixlora", "mola", "loramoe", "llava-mole")


def weights(result: dict) -> dict[str, torch.Tensor]:
    return load_file(Path(result["adapter"]) / "adapter_model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_and_peft_and_chats_load_it(method, bases, chats, tmp_path):
    config = settings(
        bases("llama"), chats, steps=4, method=method, dropout=0.1, batch_size=2, gradient_accumulation=2,
        sample_prompts=["red1?"], sample_tokens=2,
    )  # fmt: skip
    watcher = Watcher()
    whole = run(config, tmp_path / "whole", watcher)
    with pytest.raises(Cancelled):
        run(config, tmp_path / "part", Watcher(stop_at=2))
    resumed = run(config, tmp_path / "part", Watcher(), resume=True)
    first, second = weights(whole), weights(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any("a LoRA of as many on the same layers has rank" in p.message for p in watcher.seen)

    card = Path(whole["card"]).read_text()
    assert f"mixture of LoRA experts ({method})" in card
    assert "import adapters.layers.experts" in card
    ids = torch.tensor([[8, 9, 10, 11]])
    base = AutoModelForCausalLM.from_pretrained(bases("llama")).eval()
    plain = base(ids).logits
    chat = AdaptedModel(base)
    chat.add("mix", Path(whole["adapter"]))
    assert torch.equal(base(ids).logits, plain)
    with chat.active({"mix": 1.0}) as model:
        answered = model(ids).logits
    assert not torch.equal(answered, plain)
    assert torch.equal(base(ids).logits, plain)
    with pytest.raises(InputError, match=r"use 1, not 0\.5"), chat.active({"mix": 0.5}):
        pass
    peft = PeftModel.from_pretrained(base, whole["adapter"])
    torch.testing.assert_close(peft(ids).logits, answered, atol=1e-6, rtol=0)
    assert scan.record(Path(whole["adapter"]), "adapter").notes["algorithm"] == f"mixture of experts ({method})"
    with pytest.raises(InputError, match="depends on the token"):
        formats.read(whole["adapter"])
    assert MoeConfig.from_pretrained(whole["adapter"]).preset == method


def test_routers_are_not_decayed(bases, chats):
    config = settings(bases("llama"), chats, method="mola", weight_decay=0.1)
    model = add_adapter(AutoModelForCausalLM.from_pretrained(bases("llama")), config)
    groups = parameter_groups({"model": model}, "model", config)
    assert {group["part"]: group["weight_decay"] for group in groups} == {"A": 0.1, "B": 0.1, "router": 0.0}
    routers = {id(p) for name, p in model.named_parameters() if "router" in name}
    assert {id(p) for group in groups if group["part"] == "router" for p in group["params"]} == routers


def test_either_driver_turns_the_steps(bases, chats, tmp_path):
    config = settings(bases("llama"), chats, steps=3, method="mixlora", validation_split=0.25)
    usual = run(config, tmp_path / "usual", first := Watcher())
    other = accelerate.train(TrainSession.of(task_for(config), tmp_path / "loop", second := Watcher()))
    assert first.losses == pytest.approx(second.losses, rel=1e-5)
    one, two = weights(usual), weights(other)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one | two)


def test_accumulation_counts_the_router_loss_once(bases, chats, tmp_path):
    """One batch of eight against four equal ones of two: with a plain sum the routers' gradient would be four times."""
    row = json.loads(chats.read_text().splitlines()[0])
    same = write_rows(tmp_path / "same.jsonl", [row] * 8)
    found = []
    for batch, parts in ((8, 1), (2, 4)):
        config = settings(
            bases("llama"), same, steps=1, method="mixlora", router_loss=1.0, batch_size=batch, optimizer="sgd",
            gradient_accumulation=parts, learning_rate=0.1, max_grad_norm=0, warmup_ratio=0,
        )  # fmt: skip
        found.append(weights(run(config, tmp_path / f"{parts}", Watcher())))
    start = weights(run(settings(bases("llama"), same, steps=1, method="mixlora", learning_rate=1e-12), tmp_path / "0"))
    for name in (name for name in found[0] if "router" in name):
        change = [one[name] - start[name] for one in found]
        assert float(change[0].abs().max()) > 0
        torch.testing.assert_close(change[0], change[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("other", ["Trainer", "SFTTrainer"])
def test_other_trainers_take_the_router_loss_once_too(other, bases, tmp_path):
    """A Llama's loss is divided by the tokens of the whole step; TRL looks at the model again before the gradient."""
    if other == "SFTTrainer":
        from trl import SFTConfig, SFTTrainer

        kind, settings_of = SFTTrainer, SFTConfig
        more = {"processing_class": AutoTokenizer.from_pretrained(bases("llama"))}
        unused = {"bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    else:
        kind, settings_of, more, unused = Trainer, TrainingArguments, {}, {}

    class Mine(MoeTrainerMixin, kind):
        pass

    sample = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "attention_mask": [1] * 4, "task_types": 1}
    found = []
    for batch, parts in ((8, 1), (2, 4)):
        model = AutoModelForCausalLM.from_pretrained(bases("llama"))
        torch.manual_seed(0)
        peft = get_peft_model(model, preset("mixlora", {"router_loss": 1.0}.get, r=2))
        before = {name: p.detach().clone() for name, p in peft.named_parameters() if "router" in name}
        arguments = settings_of(
            str(tmp_path), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=parts,
            optim="sgd", learning_rate=0.1, max_grad_norm=0, lr_scheduler_type="constant", use_cpu=True, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, **unused,
        )  # fmt: skip
        Mine(peft, arguments, train_dataset=Dataset.from_list([sample] * 8), **more).train()
        found.append({name: p.detach() - before[name] for name, p in peft.named_parameters() if name in before})
    for name, one in found[0].items():
        assert float(one.abs().max()) > 0
        torch.testing.assert_close(one, found[1][name], rtol=1e-4, atol=1e-6)


def test_types_of_rows_reach_the_routers(bases, chats, tmp_path):
    rows = [json.loads(line) | {"kind": number % 2} for number, line in enumerate(chats.read_text().splitlines())]
    data = write_rows(tmp_path / "typed.jsonl", rows)
    asked = {"method": "loramoe", "type_column": "kind", "router_loss": 5.0}
    watcher = Watcher()
    run(settings(bases("llama"), data, steps=2, **asked), tmp_path / "run", watcher)
    logged = [p.metrics for p in watcher.seen if p.stage == "training"]
    assert all(one["router_loss"] > 0 for one in logged)
    assert not any("not used" in p.message for p in watcher.seen)
    with pytest.raises(InputError, match=r"no column 'kinds' \(did you mean 'kind'\?\)"):
        run(settings(bases("llama"), data, **asked | {"type_column": "kinds"}), tmp_path / "none")
    wrong = write_rows(tmp_path / "wrong.jsonl", [*rows, rows[0] | {"kind": 2}])
    with pytest.raises(InputError, match="line 13: the type in 'kind' is 0 or 1, not 2"):
        run(settings(bases("llama"), wrong, **asked), tmp_path / "none")


def test_a_gpt2_a_classifier_and_a_masked_model_get_experts(bases, chats, tmp_path):
    assert "adapter" in run(settings(bases("gpt2"), chats, steps=1, method="mixlora"), tmp_path / "gpt2")
    masked = write_rows(tmp_path / "texts.jsonl", [{"text": f"word{n} and more"} for n in range(8)])
    with pytest.raises(InputError, match="feed-forward block"):
        run(settings(bases("bert"), masked, steps=1, method="mixlora", task="masked"), tmp_path / "bert")
    made = run(settings(bases("bert"), masked, steps=1, method="mola", task="masked"), tmp_path / "mola")
    assert any("attention" in name for name in weights(made))
    rows = [{"text": f"{number} {word}", "label": word} for number in range(4) for word in ("a", "b")]
    labelled = write_rows(tmp_path / "labelled.jsonl", rows)
    made = run(
        settings(bases("llama"), labelled, steps=1, method="mola", task="classification"), tmp_path / "class"
    )
    assert any("score" in name for name in weights(made))


@pytest.mark.parametrize("method", METHODS)
def test_the_estimate_counts_a_mixture_and_compares_it_with_a_lora(method, bases, chats):
    chosen = settings(bases("llama"), chats, method=method, rank=4)
    work = estimates.look_at_language(chosen, "fp32")
    model = add_adapter(AutoModelForCausalLM.from_pretrained(bases("llama")), chosen)
    assert work.learnt == sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = size(model)
    assert found.experts + found.routers == work.learnt
    assert work.remark.endswith(str(found))
    targets = [name for layer in expert_layers(model).values() for name in names_of(layer)]
    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(bases("llama")), LoraConfig(r=found.rank, target_modules=targets)
    )
    ordinary = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert ordinary == pytest.approx(work.learnt, rel=0.5 / found.rank)


def names_of(layer):
    """Paths of the linear layers with experts."""
    roles = layer.places["default"].roles
    return [layer.path if not role else f"{layer.path}.{layer.structure.roles[role]}" for role in roles]


@pytest.mark.parametrize("width", ["4bit", "8bit"])
def test_a_quantised_base_learns_with_experts(width, bases, chats, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra bnb)")
    config = settings(bases("llama"), chats, quantization=width, method="mixlora", experts="4", steps=8)
    result = run(config, tmp_path, watcher := Watcher())
    assert watcher.losses[-1] < watcher.losses[0]
    assert all(bool(tensor.isfinite().all()) for tensor in weights(result).values())


def test_pictures_have_no_experts(tmp_path):
    with pytest.raises(InputError, match=r"'method' belongs to .*mixlora.*, which train language models only"):
        TrainImageConfig.parse({"data": str(tmp_path), "base": "x", "method": "mixlora"})
    for field, value in (("init", "pissa"), ("freeze_a", True), ("continue_from", "other"), ("rank_pattern", {"a": 2})):
        with pytest.raises(ValueError, match="experts"):
            settings(tmp_path, tmp_path, method="mola", **{field: value})
