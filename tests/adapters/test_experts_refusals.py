"""What mixtures of experts refuse, each with a sentence that names it, and nothing left half done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from adapters.errors import InputError
from adapters.layers.experts import MoeConfig, expert_layers
from adapters.layers.experts.beside import ExpertsBeside
from adapters.layers.experts.config import check_peft
from adapters.layers.experts.files import load, read
from adapters.layers.experts.presets import experts, preset
from tests.adapters.test_experts import answers, filled, llama

CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"num_experts": 0}, "num_experts must be whole numbers of at least 1"),
    ({"num_experts": [2, 0]}, "num_experts must be whole numbers of at least 1"),
    ({"num_experts": "tower"}, "shapes are triangle"),
    ({"num_experts": 2.5}, "num_experts is a number or a list"),
    ({"r": 0}, "r must be whole numbers"),
    ({"top_k": 0}, "top_k must be whole numbers"),
    ({"lora_alpha": 0}, "lora_alpha must be above 0"),
    ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
    ({"placement": "block"}, "placement cannot be 'block'.*ffn_block"),
    ({"router": "top1", "top_k": 2, "gate": "one"}, "'top1' uses one expert per token"),
    ({"router": "dense", "top_k": 2, "gate": "probability"}, "'dense' uses every expert"),
    ({"router": "top1"}, "renormalised gate is always 1"),
    ({"top_k": 1}, "top_k 1 a renormalised gate is always 1"),
    ({"router": "dense", "gate": "one"}, "for routers that choose experts"),
    ({"router": "external", "gate": "probability", "aux_loss": "localized"}, "router 'external' has none"),
    ({"router": "dense", "gate": "probability", "aux_loss": "load_balance"}, "counts chosen experts"),
    ({"aux_loss": "localized"}, "'localized' is for router 'dense'"),
    ({"router": "dense", "gate": "probability", "aux_loss": "localized", "num_experts": 5}, "halves the experts"),
    ({"router": "dense", "gate": "probability", "aux_loss": "localized", "lbc_delta": 1.0}, "lbc_delta must be in"),
    ({"router": "dense", "gate": "probability", "aux_loss": "localized", "lbc_groups": {0: 2}}, "a group, 0 or 1"),
    ({"aux_loss": "load_balance", "aux_coefficient": -0.1}, "aux_coefficient must be 0 or more"),
    ({"schema_version": 9}, "schema_version 9, and this version reads 1"),
]


@pytest.mark.parametrize(("choices", "sentence"), CONTRADICTIONS, ids=lambda value: str(value)[:40])
def test_contradictions_are_refused_when_the_configuration_is_made(choices: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        MoeConfig(**choices)


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"num_experts": [1, 2, 3]}, "num_experts has 3 entries, but the model has 2 layers"),
    ({"num_experts": [2, 4], "top_k": 3}, "In layer 0 a token would use 3 of 2 experts"),
    ({"num_experts": 4, "top_k": 5}, "would use 5 of 4 experts"),
    ({"num_experts": [2, 4], "target_modules": ["q_proj", "lm_head"]}, "'lm_head' is in no numbered layer"),
    ({"target_modules": ["nothing"]}, r"No module matches target_modules \['nothing'\]: linear layers here are"),
    ({"target_modules": ["mlp"]}, "is a LlamaMLP, and experts go beside linear layers"),
    ({"placement": "ffn_block", "target_modules": ["q_proj"]}, "need linear layers of such blocks among the targets"),
    ({"target_modules": ["q_proj"], "attention": "none"}, "No module is left for the experts"),
    ({"num_layers": 3, "num_experts": [2, 2, 2]}, "made for a model with 3 layers, and this one has 2"),
]


@pytest.mark.parametrize(("choices", "sentence"), MISFITS, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_the_model_is_refused_before_it_is_touched(choices: dict[str, Any], sentence: str) -> None:
    model = llama()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(InputError, match=sentence):
        get_peft_model(model, MoeConfig(**choices))
    assert [name for name, _ in model.named_modules()] == before
    assert not model._forward_pre_hooks


def test_blocks_of_other_structure_are_named() -> None:
    small: dict[str, Any] = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(ffn_dim=24, word_embed_proj_dim=16, pad_token_id=0, bos_token_id=0, eos_token_id=0,
                                   **small))  # fmt: skip
    with pytest.raises(InputError, match=r"'model.decoder.layers.0' \(OPTDecoderLayer\).*gate_proj/up_proj/down_proj"):
        get_peft_model(opt, MoeConfig(placement="ffn_block"))
    mixtral = MixtralForCausalLM(
        MixtralConfig(intermediate_size=24, num_local_experts=2, num_key_value_heads=2, **small)
    )
    with pytest.raises(InputError, match=r"'model.layers.0.mlp' is a mixture of experts already"):
        get_peft_model(mixtral, MoeConfig(placement="ffn_block"))

    class Scaled(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            for name, part in block.named_children():
                setattr(self, name, part)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model = llama()
    model.model.layers[0].mlp = Scaled(model.model.layers[0].mlp)
    with pytest.raises(InputError, match=r"'model.layers.0.mlp' \(Scaled\) is not of a known structure"):
        get_peft_model(model, MoeConfig(placement="ffn_block"))


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                              image_size=8, patch_size=4)  # fmt: skip
    text = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    made = LlavaConfig(vision_config=vision, text_config=text, image_token_index=15)
    return LlavaForConditionalGeneration(made).eval()


def test_a_vision_tower_is_left_alone_unless_it_is_named() -> None:
    model = get_peft_model(llava(), preset("llava-mole", r=2))
    assert expert_layers(model)
    assert all("language_model.layers" in path for path in expert_layers(model))
    assert model.peft_config["default"].num_layers == 2
    asked = get_peft_model(llava(), preset("llava-mole", r=2, within="model.vision_tower"))
    assert all("vision_tower" in path for path in expert_layers(asked))
    unclear = llava()
    unclear.model.speech = unclear.model.language_model
    del unclear.model.language_model
    with pytest.raises(InputError, match="no part named language_model or text_model"):
        get_peft_model(unclear, preset("llava-mole", r=2))


def test_one_place_has_experts_from_one_side_only() -> None:
    for first, second in (("ffn_block", "linear"), ("linear", "ffn_block")):
        model = get_peft_model(llama(), MoeConfig(placement=first, attention="none", num_experts=2))
        with pytest.raises(InputError, match=r"'model.layers.0.mlp.gate_proj' would get experts from two sides"):
            model.add_adapter("other", MoeConfig(placement=second, attention="none", num_experts=2))
    model = get_peft_model(llama(), MoeConfig(placement="ffn_block", num_experts=2, r=2))
    model.add_adapter("other", MoeConfig(placement="ffn_block", num_experts=3, r=2))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(InputError, match="Several adapters are active on the feed-forward block"):
        answers(model)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    place = tmp_path / "mix"
    filled(get_peft_model(llama(), preset("mixlora", {"experts": "3"}.get, r=2))).save_pretrained(str(place))
    return place


def changed(place: Path, **values: Any) -> Path:
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | values))
    return place


def test_a_saved_mixture_that_does_not_fit_its_configuration_is_named(saved: Path) -> None:
    for values, shown in (({"r": [4, 4]}, r"\(3, 2, 24\).*\(3, 4, 24\)"), ({"num_experts": [2, 2]}, r"\(3, .*\(2, ")):
        with pytest.raises(InputError, match=shown):
            PeftModel.from_pretrained(llama(), str(changed(saved, **{"r": [2, 2], "num_experts": [3, 3], **values})))
    changed(saved, r=[2, 2], num_experts=[3, 3])
    tensors = load_file(saved / "adapter_model.safetensors")
    lost = next(name for name in tensors if "router" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, saved / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"lacks '.*moeadapter_router"):
        load(llama(), saved)
    model = llama()
    before = answers(model)
    with pytest.raises(InputError, match="lacks"):
        ExpertsBeside(model, saved)
    assert not expert_layers(model)
    assert not model._forward_pre_hooks
    assert not hasattr(model, "peft_config")
    assert torch.equal(answers(model), before)
    tensors[lost] = torch.full_like(tensors[lost], torch.nan)
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(InputError, match="NaN or infinite values"):
        read(saved)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        read(saved)


def test_an_unknown_key_and_another_base_are_refused(saved: Path) -> None:
    small = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    with pytest.raises(InputError, match="made for a model with 2 layers, and this one has 3"):
        ExpertsBeside(type(llama())(small), saved)
    with pytest.raises(InputError, match=r"key 'top_p' .*which this version does not know"):
        load(llama(), changed(saved, top_p=0.8))
    with pytest.raises(InputError, match="is not a directory with a mixture"):
        read(saved.parent)


def test_other_versions_of_peft_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__version__", "0.22.1")
    with pytest.raises(InputError, match=r"from 0\.21 up to \(not including\) 0\.22, but 0\.22\.1"):
        check_peft()


def test_experts_as_an_option_says_what_it_can_be() -> None:
    assert experts("8") == 8
    assert experts("2,4,6,8") == experts("2-4-6-8") == [2, 4, 6, 8]
    assert experts("hourglass") == "hourglass"
    with pytest.raises(InputError, match=r"experts cannot be 'hourglas' .*'hourglass'"):
        experts("hourglas")


def test_the_shapes_of_mola_have_the_papers_budgets() -> None:
    from adapters.layers.experts.config import per_layer

    for name in ("triangle", "inverted-triangle", "hourglass", "rectangle"):
        assert sum(per_layer("num_experts", name, 32)) == 160
    assert sum(per_layer("num_experts", 8, 32)) == 256
    assert per_layer("num_experts", "inverted-triangle", 6) == [2, 2, 4, 6, 6, 8]


def test_one_adapter_of_data_parallel_replicas_is_refused() -> None:
    layer = next(iter(expert_layers(get_peft_model(llama(), MoeConfig(num_experts=2))).values()))
    layer.train()._is_replica = True
    with pytest.raises(InputError, match="train with DDP"):
        layer(torch.zeros(1, 2, 16))
