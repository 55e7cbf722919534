"""The tuner of expert mixtures: what PEFT and transformers ask of an adapter, for every placement and preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adapters.catalogue import find
from adapters.errors import InputError
from adapters.layers.experts import MoeConfig, aux_loss, expert_layers
from adapters.layers.experts.presets import preset

IDS = torch.tensor([[5, 9, 2, 11, 7, 3], [1, 8, 4, 6, 10, 12]])

CHOICES: dict[str, dict[str, Any]] = {
    **{name: find("layers", name).load()() | {"r": 2} for name in ("mixlora", "mola", "loramoe", "llava-mole")},
    "experts and ranks by layer": {"num_experts": [2, 4], "r": [1, 2], "router_bias": True},
    "linear dora": {"expert_kind": "dora", "num_experts": 2, "r": 2},
    "block dora": {"placement": "ffn_block", "expert_kind": "dora", "num_experts": 2, "r": 2},
}
"""The presets as they are published, and what none of them uses."""


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32,
        )
    )  # fmt: skip
    return made.eval()


def filled(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """The model with experts that change something."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "moeadapter_" in name and "_B" in name:
            nn.init.normal_(parameter, std=scale)
    return model


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.fixture(params=CHOICES, scope="module")
def choice(request: Any) -> dict[str, Any]:
    return {"task_type": "CAUSAL_LM", **CHOICES[request.param]}


def test_peft_and_transformers_add_save_load_switch_and_remove_it(choice: dict[str, Any], tmp_path: Path) -> None:
    base = answers(llama())
    model = get_peft_model(llama(), MoeConfig(**choice))
    torch.testing.assert_close(answers(model), base, atol=1e-6, rtol=0)  # B is zero
    changed = answers(filled(model))
    assert float((changed - base).abs().max()) > 1e-2
    assert get_model_status(model).peft_types == {"default": "MOEADAPTER"}
    model.save_pretrained(str(tmp_path))

    assert isinstance(PeftConfig.from_pretrained(str(tmp_path)), MoeConfig)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(llama(), str(tmp_path), low_cpu_mem_usage=low)
        torch.testing.assert_close(answers(loaded), changed, atol=0, rtol=0)
    loaded.load_adapter(str(tmp_path), adapter_name="second")
    loaded.set_adapter("second")
    torch.testing.assert_close(answers(loaded), changed, atol=0, rtol=0)
    loaded.delete_adapter("default")
    torch.testing.assert_close(answers(loaded), changed, atol=0, rtol=0)
    with loaded.disable_adapter():
        torch.testing.assert_close(answers(loaded), base, atol=0, rtol=0)

    plain = llama()
    plain.load_adapter(str(tmp_path))
    torch.testing.assert_close(answers(plain), changed, atol=1e-6, rtol=0)
    plain.add_adapter(MoeConfig(**choice), adapter_name="fresh")
    plain.set_adapter("fresh")
    torch.testing.assert_close(answers(plain), base, atol=1e-6, rtol=0)
    plain.delete_adapter("fresh")

    injected = filled(inject_adapter_in_model(MoeConfig(**choice), llama()))
    torch.testing.assert_close(answers(injected), changed, atol=1e-6, rtol=0)

    for merging in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(InputError, match="cannot be merged"):
            merging()
        torch.testing.assert_close(answers(model), changed, atol=0, rtol=0)
    unloaded = model.unload()
    assert not expert_layers(unloaded)
    torch.testing.assert_close(answers(unloaded), base, atol=0, rtol=0)


def test_auto_classes_open_an_adapter_with_a_module_trained_whole(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = get_peft_model(base, preset("mixlora", r=2, task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    with torch.no_grad():
        filled(model).lm_head.modules_to_save["default"].weight.mul_(1.5)
    changed = answers(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    for kind in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        opened = kind.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(answers(opened), changed, atol=1e-6, rtol=0)
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    config = preset("mola", r=2, task_type="CAUSAL_LM", inference_mode=True)
    assert not any(p.requires_grad for p in get_peft_model(plain, config).parameters())


def test_a_mixed_model_is_refused_cleanly(choice: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="MOEADAPTER"):
        get_peft_model(llama(), MoeConfig(**choice), mixed=True)


def test_every_parameter_has_a_gradient_and_only_the_adapter_learns(choice: dict[str, Any]) -> None:
    model = filled(get_peft_model(llama(), MoeConfig(**choice)))
    model.train()
    (model(input_ids=IDS, labels=IDS).loss + aux_loss(model)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("moeadapter_" in name), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
