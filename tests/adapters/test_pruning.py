"""Structured pruning: counts against the papers' tables and real models; cut models against masked ones."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from adapters.compression import importance, loram
from adapters.compression.slicing import masked, members, small_model
from adapters.compression.structure import (
    Kept,
    Pruning,
    Sizes,
    parameters,
    read_pruning,
    reduction,
    sizes_of,
    small_config,
)
from adapters.errors import InputError
from pipelines.language import loading

LLAMA2_70B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip
LLAMA31_70B = {**LLAMA2_70B, "vocab_size": 128256}
LLAMA2_13B = {
    "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
    "num_attention_heads": 40, "vocab_size": 32000,
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "head_dim": 6, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def tiny(kv_heads: int, kind: Any = LlamaForCausalLM, config: Any = LlamaConfig, **more: Any) -> Any:
    torch.manual_seed(kv_heads)
    model = kind(config(**TINY | {"num_key_value_heads": kv_heads} | more)).eval().double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which start at zero
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module", params=[2, 4], ids=["grouped", "one query head each"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(3))


def with_zeros(model: Any, pruning: Pruning) -> Any:
    """The whole model with what is pruned at zero."""
    made = copy.deepcopy(model)
    made.load_state_dict(masked(model.state_dict(), pruning))
    return made


def uneven(sizes: Sizes) -> Pruning:
    """Other heads and channels in every block, the middle one whole."""
    channels = tuple(range(1, sizes.channels, 3))
    return Pruning(sizes, (Kept((1,), channels), Kept(), Kept((0,), channels[2:])), "test", 0.5, "f")


def even(sizes: Sizes) -> Pruning:
    channels = tuple(range(0, sizes.channels, 4))
    return Pruning(sizes, (Kept((1,), channels), Kept((0,), channels), Kept((1,), channels)), "test", 0.5, "f")


# ------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize(
    ("config", "ratio", "small", "plain", "quantised"),
    [
        (LLAMA2_70B, 0.65, 28_099_436_544, 2.45, 9.82),
        (LLAMA2_70B, 0.75, 21_488_738_304, 3.21, 12.84),
        (LLAMA2_70B, 0.85, 16_272_924_672, 4.24, 16.95),
        (LLAMA2_70B, 0.95, 9_662_226_432, 7.14, 28.56),
        (LLAMA31_70B, 0.85, 17_849_982_976, 3.95, 15.81),
        (LLAMA2_13B, 0.65, 6_005_662_720, 2.17, 8.67),
    ],
)
def test_reductions_are_those_of_the_paper(
    config: dict[str, Any], ratio: float, small: int, plain: float, quantised: float
) -> None:
    pruning = loram.sized(sizes_of(config), ratio)
    assert reduction(pruning).small == small
    assert round(reduction(pruning).nominal, 2) == plain
    assert round(reduction(pruning, quantised=True).nominal, 2) == quantised


def test_honest_bytes_are_counted_apart() -> None:
    assert round(reduction(loram.sized(sizes_of(LLAMA2_70B), 0.85), quantised=True).counted, 1) == 15.0
    assert round(reduction(loram.sized(sizes_of(LLAMA31_70B), 0.85), quantised=True).counted, 1) == 11.4
    assert parameters(sizes_of(LLAMA2_70B)) == 68_976_648_192


@pytest.mark.parametrize(
    ("kind", "config", "more"),
    [
        (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
        (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
        (MistralForCausalLM, MistralConfig, {}),
        (Qwen2ForCausalLM, Qwen2Config, {}),
        (Qwen3ForCausalLM, Qwen3Config, {}),
    ],
)
def test_other_blocks_cut_equals_masked_and_counts(kind: Any, config: Any, more: Any, ids: torch.Tensor) -> None:
    model = tiny(2, kind, config, **more)
    sizes = sizes_of(model.config)
    assert parameters(sizes) == model.num_parameters()
    pruning = uneven(sizes)
    small = small_model(model, pruning)
    assert small.num_parameters() == parameters(sizes, pruning.counts())
    with torch.no_grad():
        wanted = with_zeros(model, pruning)(ids).logits
        torch.testing.assert_close(small(ids).logits, wanted, rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------------------------------------ cutting


@pytest.mark.parametrize("choose", [even, uneven])
def test_cut_equals_masked(model: Any, ids: torch.Tensor, choose: Any) -> None:
    pruning = choose(sizes_of(model.config))
    with torch.no_grad():
        wanted = with_zeros(model, pruning)(ids).logits
        found = small_model(model, pruning)(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_what_is_kept_is_bit_equal(model: Any) -> None:
    sizes = sizes_of(model.config)
    pruning = uneven(sizes)
    small, n, d = small_model(model, pruning), sizes.repeats, sizes.head_dim
    whole = model.model.layers[0].self_attn
    assert torch.equal(small.model.layers[0].self_attn.k_proj.weight, whole.k_proj.weight[d : 2 * d])
    assert torch.equal(small.model.layers[0].self_attn.q_proj.weight, whole.q_proj.weight[n * d : 2 * n * d])
    assert torch.equal(small.model.layers[0].self_attn.o_proj.weight, whole.o_proj.weight[:, n * d : 2 * n * d])
    down, kept = model.model.layers[2].mlp.down_proj.weight, list(pruning.layers[2].channels or ())
    assert torch.equal(small.model.layers[2].mlp.down_proj.weight, down[:, kept])
    untouched = small.model.layers[1].state_dict()
    assert all(torch.equal(untouched[name], value) for name, value in model.model.layers[1].state_dict().items())


def test_nothing_pruned_is_the_model(model: Any) -> None:
    pruning = loram.sized(sizes_of(model.config), 0.0)
    assert loram.sized(sizes_of(LLAMA2_70B), 0.0).counts() == [(8, 28672)] * 80
    small = small_model(model, pruning)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in small.state_dict().items())


def test_even_pruning_loads_in_stock_transformers(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    pruning = even(sizes_of(model.config))
    small = small_model(model, pruning)
    small.save_pretrained(tmp_path / "small")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float64)
    assert opened.config.intermediate_size == 10
    assert opened.config.head_dim == 6
    with torch.no_grad():
        torch.testing.assert_close(opened.eval()(ids).logits, small(ids).logits, rtol=1e-10, atol=1e-12)
        made = opened.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape == (2, 12)


def test_blocks_of_different_sizes_load_here_and_stock_transformers_refuses(
    model: Any, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruning = uneven(sizes_of(model.config))
    small = small_model(model, pruning)
    small.save_pretrained(tmp_path)
    pruning.write(tmp_path)
    assert read_pruning(tmp_path) == pruning
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    monkeypatch.setattr(loading, "open_tokenizer", lambda *_: type("T", (), {"pad_token_id": 0}))
    opened = loading.open_model(tmp_path, dtype="fp32").model.double()
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, small(ids).logits, rtol=1e-5, atol=1e-6)
        assert opened.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 12)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------ importance


def test_taylor_is_the_gradient_of_the_loss(model: Any, ids: torch.Tensor) -> None:
    """By a loop over the entries of each group, with autograd's own gradients."""
    sizes = sizes_of(model.config)

    def loss() -> torch.Tensor:
        found: torch.Tensor = model(ids, labels=ids).loss
        return found

    found = importance.taylor(model, sizes, [0, 2], [loss, loss])
    assert not any(parameter.grad is not None for parameter in model.parameters())
    names = [f"model.layers.2.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    weights = [model.get_parameter(name) for name in names]
    gate, up, down = ((w * g).abs() for w, g in zip(weights, torch.autograd.grad(loss(), weights), strict=True))
    for c in (0, 7, 39):
        torch.testing.assert_close(found[2].channels[c].double(), gate[c].sum() + up[c].sum() + down[:, c].sum())
    attention = model.model.layers[0].self_attn
    own = [getattr(attention, f"{letter}_proj").weight for letter in "qkvo"]
    q, k, v, o = ((w * g).abs() for w, g in zip(own, torch.autograd.grad(loss(), own), strict=True))
    for h in range(sizes.kv_heads):
        wanted = sum(one[i].sum() for one in (k, v) for i in range(h * 6, (h + 1) * 6))
        queries = range(h * sizes.repeats * 6, (h + 1) * sizes.repeats * 6)
        wanted = wanted + sum(q[i].sum() + o[:, i].sum() for i in queries)
        torch.testing.assert_close(found[0].heads[h].double(), wanted)


def test_the_best_groups_are_kept() -> None:
    assert importance.highest(torch.tensor([3.0, 1, 2, 3]), 2) == (0, 3)
    sizes = sizes_of(tiny(2).config)
    scores = importance.random(sizes, [1], seed=5)
    kept = importance.best(sizes, scores, 1, 4)
    assert kept[0] == Kept()
    assert kept[2] == Kept()
    assert set(kept[1].channels or ()) == set(scores[1].channels.topk(4).indices.tolist())
    assert len(list(members(tiny(2)))) == 3 * 7


# ------------------------------------------------------------------------------------------------ refusals


def test_refusals(tmp_path: Path) -> None:
    sizes = sizes_of(LLAMA2_70B)
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match="below 1"):
            loram.kept_counts(sizes, ratio)
    with pytest.raises(InputError, match="no channel"):
        loram.kept_counts(replace(sizes, channels=3), 0.9)
    with pytest.raises(InputError, match="no head"):
        loram.kept_counts(sizes_of(LLAMA2_13B), 0.99)
    with pytest.raises(InputError, match="leaves none to prune"):
        loram.blocks(replace(sizes, layers=6), 0.5)
    with pytest.raises(InputError, match="gpt2"):
        sizes_of({"model_type": "gpt2"})
    with pytest.raises(InputError, match="do not divide"):
        sizes_of({**LLAMA2_70B, "num_key_value_heads": 7})
    with pytest.raises(InputError, match="quantise"):
        sizes_of({**LLAMA2_70B, "quantization_config": {"load_in_4bit": True}})
    small = sizes_of(tiny(2).config)
    for wrong in (Kept((2,)), Kept((1, 1)), Kept((1, 0)), Kept(()), Kept(None, (40,))):
        Pruning(small, (wrong, Kept(), Kept())).write(tmp_path)
        with pytest.raises(InputError):
            read_pruning(tmp_path)
    with pytest.raises(InputError, match="names 1 layers"):
        masked({}, Pruning(small, (Kept(),)))
    (tmp_path / "pruning.json").write_text("{}")
    with pytest.raises(InputError, match="damaged"):
        read_pruning(tmp_path)
    with pytest.raises(InputError, match="has 24 entries"):
        masked(tiny(4).state_dict(), even(small))


def test_an_even_configuration_is_ordinary() -> None:
    plain = tiny(2).config.to_dict()
    pruning = even(sizes_of(plain))
    assert asdict(pruning)["layers"][0]["heads"] == (1,)
    made = small_config(plain, pruning)
    assert (made["num_attention_heads"], made["num_key_value_heads"], made["intermediate_size"]) == (2, 1, 10)
