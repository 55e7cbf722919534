"""Mixtures of other programs on a model: each computes what a loop over tokens and experts computes from its file."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.errors import FamilyError, InputError
from adapters.formats.moe_peft import write_mixlora
from adapters.layers.experts import importing
from pipelines.language.adapters import AdaptedModel

IDS = torch.tensor([[5, 9, 2, 11, 7, 3], [1, 8, 4, 6, 10, 12]])
WIDTH, INNER, RANK, ALPHA = 16, 24, 2, 6.0
SIZES = {
    "q_proj": (WIDTH, WIDTH), "gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER),
}  # fmt: skip
FFN = ("gate_proj", "up_proj", "down_proj")


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32,
        )
    ).eval()  # fmt: skip


def pairs(name: str, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator, (outputs, inputs) = torch.Generator().manual_seed(seed), SIZES[name]
    return [
        (torch.randn(RANK, inputs, generator=generator) / 3, torch.randn(outputs, RANK, generator=generator) / 3)
        for _ in range(count)
    ]


def store(place, tensors, config):
    place.mkdir()
    torch.save(tensors, place / "adapter_model.bin")
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def both(key: str, found, side: str = "lora_{side}.weight") -> dict[str, Tensor]:
    return {f"{key}.{side.format(side=s)}": tensor for s, tensor in zip("AB", found, strict=True)}


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def each_token(function):
    """A forward that calls ``function`` with one token after the other."""
    return lambda x: torch.stack([torch.stack([function(token) for token in row]) for row in x])


def kept(scores: Tensor, k: int) -> dict[int, float]:
    """Expert -> renormalised probability of the k largest."""
    p = scores.softmax(-1)
    chosen = p.topk(k).indices.tolist()
    return {e: float(p[e] / sum(p[i] for i in chosen)) for e in chosen}


# ------------------------------------------------------------------------------------------------ MixLoRA


def mixlora(place, k=2):
    """(folder, a base that computes the same by a loop)."""
    tensors, reference, s = {}, base(), ALPHA / RANK
    for number, block in enumerate(reference.model.layers):
        experts = {name: pairs(name, 3, 100 * number + len(name) + 7 * i) for i, name in enumerate(FFN)}
        router = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(number))
        start = f"mixlora.layers.{number}"
        tensors[f"{start}.mlp.moe_gate.weight"] = router
        for name, found in experts.items():
            for e, pair in enumerate(found):
                tensors |= both(f"{start}.mlp.{name}.experts.{e}", pair)
        (plain,) = pairs("q_proj", 1, number)
        tensors |= both(f"{start}.self_attn.q_proj", plain)
        with torch.no_grad():
            block.self_attn.q_proj.weight += s * plain[1] @ plain[0]
        mlp = block.mlp

        def expert(token, e, mlp=mlp, experts=experts):
            def linear(part, x):
                A, B = experts[part][e]
                return getattr(mlp, part).weight @ x + s * B @ (A @ x)

            return linear("down_proj", F.silu(linear("gate_proj", token)) * linear("up_proj", token))

        def ffn(token, router=router, expert=expert):
            return sum(w * expert(token, e) for e, w in kept(router @ token, k).items())

        mlp.forward = each_token(ffn)
    config = {
        "peft_type": "MIXLORA", "routing_strategy": "mixlora", "num_experts": 3, "top_k": k, "r": RANK,
        "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": ["q_proj", *FFN], "act_fn": "silu",
    }  # fmt: skip
    return store(place, tensors, config), reference


def test_mixlora(tmp_path):
    place, reference = mixlora(tmp_path / "a")
    model = importing.add(base(), importing.mixture_at(place))
    assert torch.allclose(logits(model), logits(reference), atol=1e-5)
    assert not torch.allclose(logits(model), logits(base()), atol=1e-2)
    again = write_mixlora(importing.mixture_of(model), tmp_path / "b")
    assert torch.equal(logits(importing.add(base(), importing.mixture_at(again))), logits(model))


def test_a_chat_uses_a_mixture_of_another_program(tmp_path):
    place, reference = mixlora(tmp_path / "a")
    chat = AdaptedModel(base())
    chat.add("mix", place)
    with chat.active({"mix": 1.0}) as model:
        assert torch.allclose(logits(model), logits(reference), atol=1e-5)
    assert torch.equal(logits(chat.model), logits(base()))


def test_another_activation_or_base_is_refused(tmp_path):
    place, _ = mixlora(tmp_path / "a")
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | {"act_fn": "gelu"}))
    with pytest.raises(InputError, match="activation 'gelu', but this base has 'silu'"):
        importing.add(base(), importing.mixture_at(place))
    (place / "adapter_config.json").write_text(json.dumps(config))
    small = LlamaForCausalLM(LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    ))  # fmt: skip
    with pytest.raises(FamilyError, match="this base lacks it"):
        importing.add(small, importing.mixture_at(place))


# ------------------------------------------------------------------------------------------------ one router per layer


@pytest.mark.parametrize("method", ["mola", "loramoe"])
def test_experts_beside_linear_layers(tmp_path, method):
    tensors, reference, s = {}, base(), ALPHA / RANK
    template = "lora_{{side}}_{e}.weight" if method == "mola" else "lora_{{side}}{e}.weight"
    counts = (2, 3) if method == "mola" else (3, 3)
    for number, block in enumerate(reference.model.layers):
        for name in ("up_proj", "down_proj"):
            found = pairs(name, counts[number], 10 * number + len(name))
            inputs = SIZES[name][1]
            router = torch.randn(counts[number], inputs, generator=torch.Generator().manual_seed(number))
            key = f"base_model.model.model.layers.{number}.mlp.{name}"
            for e, pair in enumerate(found):
                tensors |= both(key, pair, template.format(e=e))
            tensors[f"{key}.{'router.router' if method == 'mola' else 'lora_route'}.weight"] = router

            def linear(x, W=getattr(block.mlp, name).weight, found=found, router=router):
                scores = router @ x
                gates = kept(scores, 2) if method == "mola" else dict(enumerate(scores.softmax(-1).tolist()))
                return W @ x + s * sum(g * found[e][1] @ (found[e][0] @ x) for e, g in gates.items())

            getattr(block.mlp, name).forward = each_token(linear)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["up_proj", "down_proj"]}
    place = store(tmp_path / "a", tensors, config | ({"lora_nums": 3} if method == "loramoe" else {}))
    model = importing.add(base(), importing.mixture_at(place))
    assert model.peft_config["default"].preset == method
    assert torch.allclose(logits(model), logits(reference), atol=1e-5)


def test_llava_mole(tmp_path):
    tensors, reference = {}, base()
    for number, block in enumerate(reference.model.layers):
        start = f"llm_model.base_model.model.model.layers.{number}.mlp"
        experts = {name: pairs(name, 3, 10 * number + i) for i, name in enumerate(FFN)}
        router, bias = torch.randn(3, WIDTH) * 2, torch.randn(3)
        tensors |= {f"{start}.router.weight": router, f"{start}.router.bias": bias}
        for name, found in experts.items():
            for e, pair in enumerate(found):
                tensors |= both(f"{start}.moe_{name.removesuffix('_proj')}.{e}", pair, "lora_{side}")

        def ffn(x, mlp=block.mlp, experts=experts, router=router, bias=bias):
            e = int((router @ x + bias).argmax())

            def linear(part, z):
                A, B = experts[part][e]
                return getattr(mlp, part).weight @ z + 2 * B @ (A @ z)

            return linear("down_proj", F.silu(linear("gate_proj", x)) * linear("up_proj", x))

        block.mlp.forward = each_token(ffn)
    torch.save({"state_dict": tensors}, tmp_path / "model.pt")
    model = importing.add(base(), importing.mixture_at(tmp_path / "model.pt"))
    assert torch.allclose(logits(model), logits(reference), atol=1e-5)


def test_an_xlora_whose_experts_are_not_there(tmp_path):
    from safetensors.torch import save_file

    save_file({"last.weight": torch.zeros(1, WIDTH)}, tmp_path / "xlora_classifier.safetensors")
    (tmp_path / "xlora_config.json").write_text(json.dumps({"xlora_depth": 1, "adapters": {"law": "/nowhere"}}))
    with pytest.raises(InputError, match="'law' that is not where it says"):
        importing.add(base(), importing.mixture_at(tmp_path))
