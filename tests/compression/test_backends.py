"""Every installed way of storing weights: outputs, gradients, bytes, merging, saving; and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adapters.compression import backends
from adapters.compression.storage import plain_weight, storage, stored_bytes
from adapters.errors import InputError, MissingDependencyError
from pipelines.language.loading import open_model
from studio.conversation import Question, Variant
from studio.conversation.session import Session
from tests.language import tiny

EACH = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}"))
    for name, package in backends.PACKAGES.items()
]
STORED = {"4bit": "nf4", "8bit": "int8", "int8": "torchao int8", "int4": "torchao int4"}


def layers(name: str, size: tuple[int, int] = (64, 32)) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(*size, bias=False)).requires_grad_(False)
    assert backends.quantize(made, name, torch.float32) == 1
    return made


def with_lora(model: nn.Module, scale: float = 0.3) -> Any:
    wrapped: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["0"]))  # type: ignore[arg-type]
    layer = wrapped.base_model.model[0]
    torch.manual_seed(1)
    nn.init.normal_(layer.lora_B["default"].weight, std=scale)
    return wrapped


@pytest.mark.parametrize("name", EACH)
def test_output_gradient_and_training_beside_a_stored_weight(name: str) -> None:
    model = layers(name)
    assert storage(model[0]) == STORED[name]
    weight = plain_weight(model[0]).clone()
    x = torch.randn(5, 64, requires_grad=True)
    y = model(x)
    rounding = 2e-2 if name == "8bit" else 1e-5  # LLM.int8 rounds the inputs as well
    assert torch.allclose(y, x @ weight.T, atol=rounding * float(y.detach().abs().max()), rtol=0)
    g = torch.randn(5, 32)
    y.backward(g)
    assert torch.allclose(x.grad, g @ weight, atol=1e-5)  # type: ignore[arg-type]
    wrapped = with_lora(model)
    learning = [p for p in wrapped.parameters() if p.requires_grad]
    wrapped(x.detach()).square().mean().backward()
    assert all(bool(p.grad.any()) for p in learning)
    torch.optim.SGD(learning, lr=0.1).step()
    assert torch.equal(plain_weight(wrapped.base_model.model[0].get_base_layer()), weight)


@pytest.mark.parametrize("name", EACH)
def test_bytes_are_counted_from_the_tensors(name: str) -> None:
    bits = 8 * stored_bytes(layers(name, (1024, 512))) / (1024 * 512)
    assert bits == pytest.approx(backends.probe(name).bits, abs=0.2)
    if name == "4bit":  # 4 + 8/64 + 32/(64 256), and a table of 256 numbers for the scales
        assert bits == pytest.approx(4.127 + (32 * (256 + 16) + 32) / (1024 * 512), abs=0.005)
    assert bits > 8 if name != "4bit" else bits < 4.2


def test_shared_tensors_count_once() -> None:
    model = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(2)])
    assert stored_bytes(model) == 512
    model[1].weight = model[0].weight
    assert stored_bytes(model) == 256


@pytest.mark.parametrize("name", [*EACH, "none"])
def test_merging_stores_the_sum_as_the_weight_was_stored(name: str) -> None:
    wrapped = with_lora(nn.Sequential(nn.Linear(64, 32, bias=False)) if name == "none" else layers(name))
    layer, x = wrapped.base_model.model[0], torch.randn(7, 64)
    before, beside = layer.get_base_layer()(x), wrapped(x)
    how, weight = storage(layer.get_base_layer()), plain_weight(layer.get_base_layer()).clone()
    lost = backends.merge(layer)
    merged = layer.get_base_layer()
    assert storage(merged) == how
    assert not torch.allclose(merged(x), before, atol=1e-3)
    delta = layer.get_delta_weight("default").detach()
    off = merged(x).detach() - beside.detach()
    assert lost == pytest.approx(float((plain_weight(merged) - weight - delta).norm() / delta.norm()), abs=1e-5)
    assert float(off.norm() / (beside - before).detach().norm()) < {"none": 1e-5, "4bit": 0.2}.get(name, 0.15)


def test_an_update_smaller_than_the_steps_is_not_silently_lost() -> None:
    class Coarse(nn.Module):
        """Keeps whole numbers."""

        stored_as = "whole numbers"

        def __init__(self) -> None:
            super().__init__()
            self.in_features = self.out_features = 8
            self.register_buffer("numbers", torch.eye(8))

        def dequantise(self) -> torch.Tensor:
            return self.numbers

        def store(self, weight: torch.Tensor) -> None:
            self.numbers = weight.round()

    wrapped = with_lora(nn.Sequential(nn.Linear(8, 8, bias=False)), scale=1e-3)
    layer = wrapped.base_model.model[0]
    layer.base_layer = Coarse()
    with pytest.raises(InputError, match="lost the update"):
        backends.merge(layer)
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(9)
    assert backends.merge(layer) < 0.1
    assert bool((layer.base_layer.numbers - torch.eye(8)).any())


def test_layers_of_unknown_storage_are_not_merged_into() -> None:
    """As optimum-quanto's: a subclass of nn.Linear whose weight PEFT would write to without effect."""

    class QLinear(nn.Linear):
        pass

    wrapped = with_lora(nn.Sequential(QLinear(8, 8)))
    with pytest.raises(InputError, match=r"No adapter can be merged into a weight stored as .*QLinear: keep"):
        backends.merge(wrapped.base_model.model[0])


@pytest.mark.parametrize("name", EACH)
def test_a_language_model_in_few_bits_is_opened_by_training_and_chat_alike(name: str, tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", hidden=64)
    opened = open_model(base, quantization=name).model
    plain = open_model(base).model
    backends.quantize(plain, name, torch.float32, skip=["lm_head"])
    ids = torch.arange(6, 26)[None]
    with torch.no_grad():
        found, expected = opened(ids).logits, plain(ids).logits
    assert storage(opened.lm_head) == ""
    assert storage(opened.model.layers[0].mlp.up_proj) == STORED[name]
    assert torch.allclose(found, expected, atol=2e-2 if name == "8bit" else 1e-4)
    assert stored_bytes(opened) < stored_bytes(open_model(base).model)
    question = Question(str(base), (Variant("base"),), (({"role": "user", "content": "a"},),), "cpu", "fp32",
                        {"max_tokens": 2}, name)  # fmt: skip
    session = Session()
    assert Question.from_json(json.loads(json.dumps(question.as_json()))) == question
    assert [event["event"] for event in session.ask(question)][-1] == "end"
    assert session._base is not None
    assert storage(session._base.model.model.layers[0].mlp.up_proj) == STORED[name]


@pytest.mark.parametrize("name", EACH[:2])
def test_stored_by_bitsandbytes_saved_and_opened_again_bit_for_bit(name: str, tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base", hidden=64)
    opened = open_model(base, quantization=name)
    opened.model.save_pretrained(tmp_path / "stored")
    opened.tokenizer.save_pretrained(tmp_path / "stored")
    again = open_model(tmp_path / "stored").model
    for path, module in opened.model.named_modules():
        if storage(module):
            assert torch.equal(plain_weight(module), plain_weight(again.get_submodule(path)))


def test_what_does_not_work_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    for method in ("gptq", "awq"):
        if backends.probe(method).works:
            continue
        place = tmp_path / method
        place.mkdir()
        for file in base.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        stored = {"quant_method": method, "bits": 4, "group_size": 128}
        (place / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
        said = rf"stored as {method.upper()}; reading them needs the package gptqmodel.*torch 2\.14\.1.*4bit"
        with pytest.raises(InputError, match=said):
            open_model(place)
    with pytest.raises(InputError, match="Unknown quantization '2bit': use one of none, 8bit, 4bit, int8, int4"):
        backends.check_quantization("2bit")
    broken = backends.Probe("4bit", "bitsandbytes", "0.1", False, "a layer of 64 x 64 fails: RuntimeError: no kernel")
    monkeypatch.setattr(backends, "probe", lambda name: broken)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    with pytest.raises(InputError, match=r"bitsandbytes 0\.1: a layer of 64 x 64 fails: RuntimeError: no kernel"):
        backends.quantize(copy.deepcopy(nn.Sequential(nn.Linear(4, 4))), "4bit", torch.float32)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"A base in 4bit needs the package 'bitsandbytes'"):
        backends.check_works("4bit")
