"""Mixtures of experts beside weights stored in few bits: the numbers that they have beside the restored weights."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from adapters.compression import backends
from adapters.compression.normal_float import Configuration, NormalFloatLinear, quantise
from adapters.compression.storage import plain_weight, storage
from adapters.formats.lora import LoraLayer
from adapters.layers.experts import aux_loss, expert_layers, xlora
from adapters.layers.experts.classifier import ClassifierOptions
from adapters.layers.experts.presets import preset
from tests.language import tiny

OWN = "packed"
EACH = [OWN, *(
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}"))
    for name, package in backends.PACKAGES.items()
)]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tiny.llama(tmp_path_factory.mktemp("base"), hidden=64)
    return AutoModelForCausalLM.from_pretrained(place).requires_grad_(False).eval()


def stored(model: Any, name: str) -> Any:
    """A copy whose linear layers, but for the output, are stored in few bits."""
    made = copy.deepcopy(model)
    if name != OWN:
        backends.quantize(made, name, torch.float32, skip=["lm_head"])
        return made
    for path, module in list(made.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            parent, _, last = path.rpartition(".")
            packed = NormalFloatLinear(quantise(module.weight, Configuration(bits=4)))
            setattr(made.get_submodule(parent), last, packed)
    return made


def restored(model: Any) -> Any:
    """A copy with the restored weights as ordinary layers."""
    made = copy.deepcopy(model)
    for path, module in model.named_modules():
        if storage(module):
            parent, _, last = path.rpartition(".")
            weight = plain_weight(module)
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
            plain.weight.copy_(weight)
            setattr(made.get_submodule(parent), last, plain)
    return made


def with_experts(model: Any, method: str, **more: Any) -> Any:
    torch.manual_seed(1)
    made = get_peft_model(model, preset(method, r=4, num_experts=4, **more))
    for layer in expert_layers(made).values():
        for name, tensor in layer.named_parameters():
            if "_B" in name:
                nn.init.normal_(tensor, std=0.05)
    return made


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize(("method", "kind"), [("mixlora", "lora"), ("mola", "lora"), ("mixlora", "dora")])
def test_it_is_the_mixture_beside_the_restored_weights(name: str, method: str, kind: str, base: Any) -> None:
    few = stored(base, name)
    ids = torch.randint(6, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    beside = with_experts(few, method, expert_kind=kind)
    found = beside(input_ids=ids, labels=ids)
    (found.loss + aux_loss(beside)).backward()
    if name == "8bit":  # LLM.int8 rounds the inputs as well
        close: dict[str, float] = {"atol": 0.3, "rtol": 0.1}
    else:
        close = {"atol": 2e-4, "rtol": 1e-3}
    plain = with_experts(restored(stored(base, name)), method, expert_kind=kind)
    wanted = plain(input_ids=ids, labels=ids)
    (wanted.loss + aux_loss(plain)).backward()
    torch.testing.assert_close(found.logits, wanted.logits, **close)
    own = {key: p.grad for key, p in beside.named_parameters() if p.requires_grad}
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in own.values())
    if name != "8bit":
        for key, parameter in plain.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(own[key], parameter.grad, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("name", EACH)
@torch.no_grad()
def test_an_x_lora_too(name: str, base: Any) -> None:
    def mixed(model: Any) -> Any:
        generator = torch.Generator().manual_seed(2)
        experts = [
            xlora.Expert(called, {f"model.layers.{n}.mlp.down_proj": LoraLayer(
                torch.randn(rank, 128, generator=generator) / 10, torch.randn(64, rank, generator=generator) / 10, 4.0
            ) for n in range(2)})
            for called, rank in (("law", 2), ("code", 4))
        ]  # fmt: skip
        torch.manual_seed(3)
        return xlora.add(model, experts, ClassifierOptions()).eval()

    ids = torch.randint(6, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    found, wanted = (mixed(model)(input_ids=ids).logits for model in (stored(base, name), restored(stored(base, name))))
    close = {"atol": 0.3, "rtol": 0.1} if name == "8bit" else {"atol": 2e-4, "rtol": 1e-3}
    torch.testing.assert_close(found, wanted, **close)
