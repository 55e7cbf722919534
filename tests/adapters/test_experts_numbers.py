"""The numbers of expert mixtures against slow references written from the papers, and identities."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from adapters.errors import InputError
from adapters.layers.experts import MoeConfig, aux_loss, compute, expert_layers, losses, routing_of, sample_types
from adapters.layers.experts.export import as_lora
from adapters.layers.experts.gates import choose
from adapters.layers.experts.presets import preset
from adapters.layers.experts.redundancy import distances, redundancy
from adapters.layers.experts.routing import Record, Routing, Segment, watched
from adapters.layers.experts.size import size
from adapters.layers.sizes import sizes
from tests.adapters.test_experts import IDS, answers, filled, llama

PATHS = ("loop", "stacked", "sorted")


def mixture(config: MoeConfig, model: Any = None, scale: float = 0.3) -> Any:
    """A small model with a filled mixture, in evaluation mode."""
    return filled(get_peft_model(model or llama(), config), scale).eval()


def only(model: Any) -> Any:
    """The first layer with several experts."""
    return next(layer for layer in expert_layers(model).values() if layer.places["default"].experts > 1)


# ------------------------------------------------------------------------------------------------ ways to compute


@pytest.mark.parametrize("router", ["topk", "dense", "top1"])
@pytest.mark.parametrize("rank", [3, 8])
def test_the_three_ways_agree_in_output_and_every_gradient(router: str, rank: int) -> None:
    torch.manual_seed(0)
    T, N, width, out = 13, 5, 12, 20
    A, B = torch.randn(N, rank, width), torch.randn(N, out, rank)
    x, logits = torch.randn(T, width), torch.randn(T, N)
    logits[:, 4] = -50  # an expert without tokens, unless all are used
    k, gate = {"topk": (2, "renormalised"), "dense": (0, "probability"), "top1": (1, "straight_through")}[router]
    found = {}
    for path in PATHS:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, A, B, logits)]
        gates = choose(leaves[3].softmax(-1), router, k, gate)
        made = compute.mixed(leaves[0], leaves[1], leaves[2], gates, path)
        made.square().sum().backward()
        found[path] = [made, *(leaf.grad for leaf in leaves)]
        if router != "dense":
            assert torch.equal(leaves[1].grad[4], torch.zeros_like(A[4]))  # zeros, not None
    for path in PATHS[1:]:
        for one, other in zip(found["loop"], found[path], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(one.detach().abs().max()))
    dense = choose(logits.softmax(-1), router, k, gate).dense()
    slow = torch.stack([sum(dense[t, e] * (B[e] @ (A[e] @ x[t])) for e in range(N)) for t in range(T)])
    torch.testing.assert_close(found["loop"][0], slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("placement", ["linear", "ffn_block"])
def test_the_ways_agree_inside_a_model(placement: str, kind: str) -> None:
    found = []
    for path in PATHS:
        config = MoeConfig(placement=placement, num_experts=4, r=3, expert_kind=kind, compute=path)
        model = mixture(config)
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append({"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for other in found[1:]:
        for name, one in found[0].items():
            torch.testing.assert_close(one, other[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("placement", ["linear", "ffn_block"])
def test_gradients_are_those_of_finite_differences(placement: str) -> None:
    model = mixture(MoeConfig(placement=placement, num_experts=3, r=2, compute="loop")).double()
    layer = only(model)
    x = torch.randn(1, 3, layer.width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    values = [dict(layer.named_parameters())[name].detach().clone().requires_grad_() for name in names]

    def run(*given: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, tuple(values), atol=1e-6, fast_mode=True)


# ------------------------------------------------------------------------------------------------ references


def slow_linear(layer: Any, x: torch.Tensor, gates: Any) -> torch.Tensor:
    """y_t = W0 x_t + s sum_e g_e(x_t) B_e A_e x_t, token by token."""
    place, found = layer.places["default"], layer.factors("default")
    rows = []
    for token in x.flatten(0, 1):
        weight = gates(layer.moeadapter_router["default"].weight @ token)
        delta = sum(weight[e] * (found.B[e] @ (found.A[e] @ token)) for e in range(place.experts))
        rows.append(layer.base_layer(token) + place.scale * delta)
    return torch.stack(rows).view(*x.shape[:-1], -1)


def slow_block(layer: Any, x: torch.Tensor, gates: Any) -> torch.Tensor:
    """y_t = sum_e g_e FFN_e(x_t), every expert a whole feed-forward block with its LoRAs."""
    place, block, router = layer.places["default"], layer.base_layer, layer.moeadapter_router["default"]
    role = {name: layer.factors("default", name) for name in ("gate", "up", "down")}

    def adapted(name: str, e: int, module: nn.Linear, z: torch.Tensor) -> torch.Tensor:
        return module(z) + place.scale * (role[name].B[e] @ (role[name].A[e] @ z))

    rows = []
    for token in x.flatten(0, 1):
        logits = router.weight @ token + (0 if router.bias is None else router.bias)
        weight, total = gates(logits), 0
        for e in range(place.experts):
            hidden = F.silu(adapted("gate", e, block.gate_proj, token)) * adapted("up", e, block.up_proj, token)
            total = total + weight[e] * adapted("down", e, block.down_proj, hidden)
        rows.append(total)
    return torch.stack(rows).view(*x.shape[:-1], -1)


def two_renormalised(logits: torch.Tensor) -> torch.Tensor:
    kept = torch.full_like(logits, -torch.inf)
    best = logits.topk(2).indices
    kept[best] = logits[best]
    return kept.softmax(-1)  # softmax of the kept logits = renormalised probabilities


def the_largest(logits: torch.Tensor) -> torch.Tensor:
    return F.one_hot(logits.argmax(), len(logits)).to(logits.dtype)


REFERENCES: dict[str, tuple[Any, Any]] = {
    "mixlora": (slow_block, two_renormalised),
    "mola": (slow_linear, two_renormalised),
    "loramoe": (slow_linear, lambda logits: logits.softmax(-1)),
    "llava-mole": (slow_block, the_largest),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_each_preset_is_what_its_paper_writes(name: str) -> None:
    model = mixture(preset(name, r=2, lora_alpha=4))
    layer = only(model)
    x = torch.randn(2, 5, layer.width, generator=torch.Generator().manual_seed(0))
    reference, gates = REFERENCES[name]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), reference(layer, x, gates), rtol=1e-5, atol=1e-6)
    attention = expert_layers(model).get("model.layers.0.self_attn.q_proj")
    wanted = {"mixlora": 1, "llava-mole": 1, "mola": 2, "loramoe": None}[name]
    assert (attention and attention.places["default"].experts) == wanted


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(("router", "gate", "k"), [("top1", "probability", 1), ("topk", "one", 2), ("external", "", 0)])
def test_gates_of_any_sum_weigh_what_the_experts_change(router: str, gate: str, k: int, kind: str) -> None:
    """y = FFN + sum_e g_e (FFN_e - FFN) with biases everywhere, so that nothing is counted twice."""
    config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2, mlp_bias=True)  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).eval()
    for name, parameter in base.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    choices = {"router": router, "gate": gate or "probability", "top_k": k if router == "topk" else None}
    before = answers(base)
    model = get_peft_model(base, MoeConfig(placement="ffn_block", num_experts=3, r=2, expert_kind=kind, **choices))
    given = torch.tensor([0.9, -0.3, 0.7])
    routing_of(model).external_gates = given
    torch.testing.assert_close(answers(model), before, atol=1e-6, rtol=0)
    layer = expert_layers(filled(model))["model.layers.0.mlp"]
    x = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        gates = layer.gates("default", x, slice(0, 1)).dense()
        slow = layer.base_layer(x)
        for e in range(3):
            one = copy.deepcopy(layer.base_layer)
            for role, name in layer.structure.roles.items():
                found, linear = layer.factors("default", role), getattr(one, name)
                linear.weight += layer.places["default"].scale * found.B[e] @ found.A[e]
                if found.magnitude is not None:
                    linear.weight *= (found.magnitude[e] / linear.weight.norm(dim=1))[:, None]
            slow = slow + gates[:, e].view(1, 4, 1) * (one(x) - layer.base_layer(x))
        torch.testing.assert_close(layer(x), slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "phi", "phi3"])
def test_blocks_without_a_gate_and_with_a_fused_one(family: str) -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    llamas = small | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base: Any = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, **small)),
        "phi": lambda: PhiForCausalLM(PhiConfig(**llamas)),
        "phi3": lambda: Phi3ForCausalLM(Phi3Config(**llamas)),
    }[family]().eval()
    for name, parameter in base.named_parameters():
        if "mlp" in name and "bias" in name:
            nn.init.normal_(parameter)
    before = answers(base)
    model = get_peft_model(base, preset("mixlora", lambda o: "3" if o == "experts" else None, r=2))
    torch.testing.assert_close(answers(model), before, atol=1e-6, rtol=0)
    filled(model)
    layer = only(model)
    x = torch.randn(1, 4, layer.width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made = layer(x)
        gates = layer.gates("default", x, slice(0, 1)).dense()
        slow = torch.zeros_like(made)
        for e in range(3):
            one = copy.deepcopy(layer.base_layer)
            for role, name in layer.structure.roles.items():
                found, linear = layer.factors("default", role), getattr(one, name)
                delta = layer.places["default"].scale * found.B[e] @ found.A[e]
                linear.weight += delta.T if family == "gpt2" else delta
            slow += gates[:, e].view(1, 4, 1) * one(x)
    torch.testing.assert_close(made, slow, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("placement", ["linear", "ffn_block"])
def test_one_expert_is_a_plain_lora_and_is_exported_as_one(placement: str) -> None:
    model = mixture(MoeConfig(placement=placement, num_experts=1, r=2, lora_alpha=4))
    layers = as_lora(model)
    targets = sorted({name.rpartition(".")[2] for name in layers})
    assert targets == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    plain = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    with torch.no_grad():
        for name, layer in layers.items():
            lora = plain.get_submodule(f"base_model.model.{name}")
            lora.lora_A["default"].weight.copy_(layer.A)
            lora.lora_B["default"].weight.copy_(layer.B)
    torch.testing.assert_close(answers(model), answers(plain), rtol=1e-5, atol=1e-6)


def test_constant_gates_are_one_lora_of_the_sum_of_ranks() -> None:
    model = mixture(MoeConfig(router="external", gate="probability", num_experts=3, r=2))
    gates = torch.tensor([0.2, 0.5, 0.3])
    routing_of(model).external_gates = gates
    layers = as_lora(model, gates=gates)
    assert {layer.rank for layer in layers.values()} == {6}
    changed = answers(model)
    base = llama()
    with torch.no_grad():
        for name, layer in layers.items():
            base.get_submodule(name).weight += layer.delta()
    torch.testing.assert_close(changed, answers(base), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="mixed for each token"):
        as_lora(mixture(MoeConfig(num_experts=2)))
    with pytest.raises(InputError, match="whole feed-forward blocks"):
        as_lora(mixture(MoeConfig(placement="ffn_block", num_experts=2)), gates=[0.5, 0.5])


@pytest.mark.parametrize("placement", ["linear", "ffn_block"])
def test_equal_experts_need_no_router_and_their_order_does_not_matter(placement: str) -> None:
    model = mixture(MoeConfig(placement=placement, num_experts=4, r=2))
    before = answers(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moeadapter" in name and parameter.shape[0] == 4:
                parameter.copy_(parameter.flip(0))
    torch.testing.assert_close(answers(model), before, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moeadapter" in name and "router" not in name:
                parameter.copy_(parameter[:1].expand_as(parameter))
    equal = answers(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.normal_()
    torch.testing.assert_close(answers(model), equal, rtol=1e-5, atol=1e-6)


def test_gates_sum_to_one_over_k_experts_and_layers_differ() -> None:
    model = mixture(MoeConfig(num_experts=[2, 4], top_k=[1, 3], r=[1, 2], gate="probability"))
    for path, layer in expert_layers(model).items():
        place = layer.places["default"]
        assert (place.experts, place.top_k, place.rank) == ((2, 1, 1) if ".0." in path else (4, 3, 2))
    p = torch.randn(7, 4).softmax(-1)
    dense = choose(p, "topk", 3, "renormalised").dense()
    torch.testing.assert_close(dense.sum(1), torch.ones(7))
    assert ((dense > 0).sum(1) == 3).all()


def test_the_router_of_a_top_one_mixture_learns_from_the_task_only_where_it_says_so() -> None:
    found = {}
    for grad in ("none", "straight_through", "probability"):
        chosen = {"router_grad": grad, "router_loss": 0.0}
        model = mixture(preset("llava-mole", chosen.get, r=2)).train()
        outputs = model(input_ids=IDS, labels=IDS)
        outputs.loss.backward()
        found[grad] = outputs.logits.detach(), only(model).moeadapter_router["default"].weight.grad
    assert float(found["none"][1].abs().max()) == 0
    assert float(found["straight_through"][1].abs().max()) > 0
    assert torch.equal(found["none"][0], found["straight_through"][0])
    assert not torch.equal(found["none"][0], found["probability"][0])


@pytest.mark.parametrize("placement", ["linear", "ffn_block"])
def test_segments_of_a_batch_are_separate_passes(placement: str) -> None:
    model = get_peft_model(llama(), MoeConfig(placement=placement, num_experts=3, r=2))
    model.add_adapter("other", MoeConfig(placement=placement, num_experts=2, r=4))
    filled(model).eval()
    ids = IDS.repeat(2, 1)[:3]
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = answers_of(model, ids)
    with model.disable_adapter():
        alone[""] = answers_of(model, ids)
    routing_of(model).segments = [Segment("other", 0, 1), Segment(None, 1, 2), Segment("default", 2, 3)]
    packed = answers_of(model, ids)
    for row, name in enumerate(("other", "", "default")):
        torch.testing.assert_close(packed[row], alone[name][row], rtol=1e-5, atol=1e-6)


def answers_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


# ------------------------------------------------------------------------------------------------ losses


def record(p: torch.Tensor, k: int | None = 2, mask: torch.Tensor | None = None, types: Any = None) -> Record:
    chosen = None if k is None else p.topk(k, dim=-1).indices
    return Record("m", 0, p.log(), p, chosen, mask, types)


def test_the_balance_loss_is_its_formula_one_when_even_and_n_when_collapsed() -> None:
    p = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    numbers = p.flatten(0, 1).numpy()
    share = np.zeros(4)
    for row in numbers:
        share[np.argsort(-row)[:2]] += 1 / len(numbers)
    wanted = 4 * float((share * numbers.mean(0)).sum())
    assert float(losses.load_balance([record(p)], "k")) == pytest.approx(wanted, rel=1e-5)
    assert float(losses.load_balance([record(p)], "one")) == pytest.approx(wanted / 2, rel=1e-5)
    assert float(losses.load_balance([record(p)], "1/N")) == pytest.approx(wanted / 8, rel=1e-5)
    even = torch.full((1, 4, 4), 0.25)
    spread = Record("m", 0, even.log(), even, torch.tensor([[[0, 1], [1, 2], [2, 3], [3, 0]]]), None, None)
    assert float(losses.load_balance([spread], "k")) == pytest.approx(2)
    lost = F.one_hot(torch.zeros(2, 3, dtype=torch.long), 4).float() * (1 - 4e-6) + 1e-6
    assert float(losses.sample_balance([record(lost, 1)], "one")) == pytest.approx(4, rel=1e-4)
    assert float(losses.load_balance([record(lost, 1)], "one")) == pytest.approx(4, rel=1e-4)


def test_molas_loss_is_summed_over_layers_one_for_each_that_is_even() -> None:
    config = preset("mola", aux_coefficient=1.0, num_experts=4)
    even = torch.full((1, 4, 4), 0.25)
    chosen = torch.tensor([[[0, 1], [1, 2], [2, 3], [3, 0]]])
    routing = Routing(configs={"default": config})
    for layer in range(3):
        for module in range(7):
            routing.record("default", Record(f"{layer}.{module}", layer, even.log(), even, chosen, None, None))
    assert float(losses.total(routing, "default")) == pytest.approx(3)


def test_padding_changes_no_loss_and_pooled_layers_hide_a_collapse() -> None:
    p = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)).softmax(-1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    types, config = torch.tensor([0, 1]), preset("loramoe", lambda o: "t" if o == "type_column" else None)
    other = torch.where(mask[..., None], p, p.flip(-1))
    for value in (losses.load_balance, losses.sample_balance):
        torch.testing.assert_close(value([record(p, 2, mask)]), value([record(other, 2, mask)]))
    found = [losses.localized(record(values, None, mask, types), config) for values in (p, other)]
    torch.testing.assert_close(*found)
    collapsed = []
    for pair in range(4):
        q = torch.full((1, 3, 8), 1e-6)
        q[..., 2 * pair : 2 * pair + 2] = 0.5
        collapsed.append(Record("m", pair, q.log(), q, q.topk(2, dim=-1).indices, None, None))
    assert float(losses.load_balance(collapsed)) == pytest.approx(2, rel=1e-3)  # as if it were even
    assert np.mean([float(losses.load_balance([one])) for one in collapsed]) == pytest.approx(8, rel=1e-3)


def test_the_balance_loss_pushes_an_overused_expert_down() -> None:
    logits = torch.zeros(1, 20, 4)
    logits[..., 0] = 1.0
    logits.requires_grad_()
    p = logits.softmax(-1)
    losses.load_balance([record(p, 1)], "one").backward()
    assert (logits.grad[..., 0] > 0).all()
    assert (logits.grad[..., 1:] < 0).all()


@pytest.mark.parametrize("form", ["cv2", "var_over_mean"])
def test_the_localized_loss_is_its_formula(form: str) -> None:
    config = preset("loramoe", lambda o: {"type_column": "t", "lbc_form": form, "lbc_delta": 0.2}.get(o))
    p = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    types = torch.tensor([1, 0, 0, 1])
    Z = np.zeros((4, 6))
    for m in range(4):
        for i in range(6):
            same = (i < 3) == (int(types[m]) == 1)
            Z[m, i] = (1.2 if same else 0.8) * float(p[m, :, i].sum())
    wanted = Z.var(ddof=1) / (Z.mean() ** 2 if form == "cv2" else Z.mean())
    assert float(losses.localized(record(p, None, None, types), config)) == pytest.approx(wanted, rel=1e-5)


def test_the_localized_loss_at_uniform_routing_and_at_its_minimum() -> None:
    config = preset("loramoe", lambda o: "t" if o == "type_column" else None)
    types = torch.tensor([0, 1] * 4)
    even = torch.full((8, 2, 6), 1 / 6)
    assert float(losses.localized(record(even, None, None, types), config)) == pytest.approx(0.01 * 48 / 47, rel=1e-4)
    logits = torch.randn(8, 2, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_change=1e-14, tolerance_grad=1e-12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = losses.localized(record(logits.softmax(-1), None, None, types), config)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(losses.localized(record(logits.softmax(-1), None, None, types), config).detach()) < 1e-7
    mass = logits.detach().softmax(-1).mean(1)[:, :3].sum(1)
    torch.testing.assert_close(mass[types == 1], torch.full((4,), 0.45), atol=1e-3, rtol=0)  # the first half gets less
    torch.testing.assert_close(mass[types == 0], torch.full((4,), 0.55), atol=1e-3, rtol=0)


def test_the_localized_loss_leaves_its_own_experts_alone_and_the_types_come_with_the_batch() -> None:
    model = mixture(preset("loramoe", lambda o: "t" if o == "type_column" else None, r=2)).train()
    model(input_ids=IDS, task_types=torch.tensor([0, 1]))
    loss = aux_loss(model)
    loss.backward()
    last = expert_layers(model)["model.layers.1.mlp.down_proj"]  # experts elsewhere move what later routers see
    assert float(last.moeadapter_router["default"].weight.grad.abs().max()) > 0
    assert all(tensors["default"].grad is None for tensors in (last.moeadapter_A, last.moeadapter_B))
    with sample_types(model, torch.tensor([0, 1])):
        model(input_ids=IDS)
    torch.testing.assert_close(aux_loss(model), loss)
    model(input_ids=IDS)
    with pytest.raises(InputError, match="column 'task_types'"):
        aux_loss(model)
    model(input_ids=IDS, task_types=torch.tensor([0, 7]))
    with pytest.raises(InputError, match="sample type 7 is not among"):
        aux_loss(model)
    model(input_ids=IDS, task_types=torch.tensor([0]))
    with pytest.raises(InputError, match="1 sample types for a batch of 2"):
        aux_loss(model)


# ------------------------------------------------------------------------------------------------ the routing context


def balanced(**more: Any) -> MoeConfig:
    return MoeConfig(num_experts=4, r=2, aux_loss="load_balance", aux_coefficient=0.5, **more)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("placement", ["linear", "ffn_block"])
def test_checkpointing_changes_no_gradient_and_the_reentrant_kind_is_refused(placement: str) -> None:
    found = []
    for kind in (None, False, True):
        model = mixture(balanced(placement=placement)).train()
        model.enable_input_require_grads()
        if kind is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind})
        if kind:
            with pytest.raises(InputError, match="use_reentrant"):
                model(input_ids=IDS, labels=IDS)
            continue
        loss = model(input_ids=IDS, labels=IDS).loss
        before = len(routing_of(model).records["default"])
        (loss + aux_loss(model)).backward()
        assert len(routing_of(model).records["default"]) == before
        found.append(gradients(model))
    for name, one in found[0].items():
        assert torch.equal(one, found[1][name]), name


def test_external_gates_that_learn_survive_checkpointing_and_refuse_the_reentrant_kind() -> None:
    found = []
    for use in (False, True):
        model = mixture(MoeConfig(router="external", gate="probability", num_experts=2, trained="router")).train()
        model.enable_input_require_grads()
        gates = torch.full((2, 6, 2), 0.5, requires_grad=True)
        routing_of(model).external_gates = gates
        if use:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append(gates.grad)
        assert all(not p.requires_grad for n, p in model.named_parameters())
    assert torch.equal(*found)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(InputError, match="use_reentrant"):
        model(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("name", ["mixlora", "llava-mole"])
def test_blocks_of_experts_decode_with_a_cache_as_without(name: str) -> None:
    model = mixture(preset(name, r=2, task_type="CAUSAL_LM"))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached, slow = (model.generate(input_ids=IDS, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, slow)
    assert not torch.equal(cached, llama().generate(input_ids=IDS, use_cache=True, **options))
    assert routing_of(model).records == {}


def test_nothing_is_recorded_in_evaluation_or_by_generate_and_a_copy_has_its_own_context() -> None:
    model = mixture(balanced(task_type="CAUSAL_LM"))
    made = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0)
    slow = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(made, slow)
    assert routing_of(model).records == {}
    embedded = model(inputs_embeds=model.get_input_embeddings()(IDS)).logits
    torch.testing.assert_close(embedded, model(IDS).logits)
    with watched(model) as routing:
        model(IDS)
        loads = losses.load(routing.records["default"].values())
    assert len(loads) == 14
    assert all(sum(one.fraction) == pytest.approx(1, abs=1e-5) for one in loads)
    other = copy.deepcopy(model)
    assert routing_of(other) is not routing_of(model)
    other.train()(input_ids=IDS)
    assert routing_of(model).records.get("default", {}).keys() == {one.module for one in loads}
    assert float(aux_loss(other).detach()) > 0
    model(IDS)
    assert routing_of(model).records == {}


def test_the_auxiliary_loss_can_come_with_the_models_output() -> None:
    model = mixture(balanced(attach_aux_to_output=True)).train()
    outputs = model(input_ids=IDS, labels=IDS)
    aux = aux_loss(model)
    torch.testing.assert_close(outputs.aux_loss, aux)
    model.eval()
    torch.testing.assert_close(outputs.loss - aux, model(input_ids=IDS, labels=IDS).loss)


def test_routers_stay_in_full_precision_on_a_half_precision_base() -> None:
    for cast in (True, False):
        model = get_peft_model(llama().bfloat16(), balanced(), autocast_adapter_dtype=cast)
        layer = only(model)
        assert layer.moeadapter_router["default"].weight.dtype == torch.float32
        assert layer.moeadapter_A["default"].dtype == (torch.float32 if cast else torch.bfloat16)
        assert model(IDS).logits.dtype == torch.bfloat16




def test_distances_of_experts_are_those_of_their_products() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(4, 3, 10), torch.randn(4, 7, 3)
    found = distances(A, B, 0.5)
    for i in range(4):
        for j in range(4):
            assert float(found[i, j]) == pytest.approx(float((0.5 * (B[i] @ A[i] - B[j] @ A[j])).norm()), abs=1e-5)
    model = mixture(preset("mola", r=2))
    assert list(redundancy(model)) == [0, 1]
    layer = expert_layers(model)["model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        for other in expert_layers(model).values():
            if ".0.self_attn" in other.path:
                for tensor in (other.moeadapter_A["default"], other.moeadapter_B["default"]):
                    tensor.copy_(tensor[:1].expand_as(tensor))
    assert layer.places["default"].experts == 2
    assert redundancy(model)[0] == pytest.approx(0, abs=1e-6)
    assert redundancy(model)[1] > 0


def test_parameters_of_mola_are_its_formula() -> None:
    model = get_peft_model(llama(), preset("mola", r=[2, 4]))
    wanted = sum(
        layer.places["default"].experts * (layer.places["default"].rank * sum(sizes(layer.base_layer)) + layer.width)
        for layer in expert_layers(model).values()
    )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == wanted
    even = [torch.full((1, 2, n), 1 / n) for n in (2, 4)]
    records = [
        Record(f"{layer}{name}", layer, p.log(), p, torch.tensor([[[0, 1], [n - 2, n - 1]]]), None, None)
        for layer, (p, n) in enumerate(zip(even, (2, 4), strict=True))
        for name in "ab"
    ]
    config = preset("mola", {"router_loss": 1.0}.get)
    values = [losses.load_balance(group, config.aux_norm) for group in losses.pools(config, records)]
    assert float(sum(values)) == pytest.approx(2)  # one for each layer at uniform routing


def _ddp(rank: int, port: int, shared: Any) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    for name in ("mixlora", "llava-mole"):
        model = mixture(preset(name, r=2)).train()
        wrapped = DistributedDataParallel(model)  # without find_unused_parameters: every one must have a gradient
        for _ in range(2):
            (wrapped(input_ids=IDS[rank : rank + 1], labels=IDS[rank : rank + 1]).loss + aux_loss(model)).backward()
        shared[f"{name}{rank}"] = {n: p.grad.tolist() for n, p in model.named_parameters() if p.requires_grad}
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_together_without_unused_parameters() -> None:
    import socket

    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(_ddp, (port, shared), nprocs=2)
        for name in ("mixlora", "llava-mole"):
            assert shared[f"{name}0"] == shared[f"{name}1"]


@pytest.mark.parametrize("name", ["mixlora", "mola", "llava-mole"])
def test_at_the_start_the_task_moves_no_router_and_the_balance_loss_does(name: str) -> None:
    """B is zero, so every expert gives the same; after one step they differ."""
    options = {"router_loss": 1.0, "router_grad": "straight_through"}
    model = get_peft_model(llama(), preset(name, options.get, r=2)).train()
    routers = {n: p for n, p in model.named_parameters() if "router" in n}
    outputs = model(input_ids=IDS, labels=IDS)
    balance = aux_loss(model)
    torch.testing.assert_close(outputs.logits, llama()(IDS).logits, rtol=0, atol=1e-6)
    outputs.loss.backward(retain_graph=True)
    assert all(float(p.grad.abs().max()) < 1e-8 for p in routers.values())  # renormalised: 0 up to rounding
    model.zero_grad()
    balance.backward()
    assert all(bool(p.grad.isfinite().all()) for p in routers.values())
    assert any(float(p.grad.abs().max()) > 0 for p in routers.values())
    model.zero_grad()
    filled(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for p in routers.values())


def test_a_token_of_llava_mole_costs_one_lora_and_a_router() -> None:
    found = size(get_peft_model(llama(), preset("llava-mole", r=2)))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    plain = get_peft_model(llama(), LoraConfig(r=2, target_modules=targets))
    lora = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    assert found.active == lora + found.routers
    assert found.routers == 2 * (3 * 16 + 3)


def test_dropout_is_the_experts_and_not_the_routers() -> None:
    model = mixture(MoeConfig(num_experts=4, r=2, lora_dropout=0.5)).train()
    layer = only(model)
    x = torch.randn(1, 4, layer.width)
    with torch.no_grad():
        torch.manual_seed(0)
        gates = layer.gates("default", x, slice(0, 1)).dense()
        assert torch.equal(gates, layer.gates("default", x, slice(0, 1)).dense())
        assert not torch.equal(layer(x), layer(x))
        torch.testing.assert_close(gates.sum(1), torch.ones(4))


def test_weights_that_cannot_be_read_have_no_dora() -> None:
    class Packed(nn.Linear):
        """Keeps its weight in another shape, as libraries of few bits do."""

        def __init__(self) -> None:
            super().__init__(16, 16, bias=False)
            self.weight = nn.Parameter(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = llama()
    model.model.layers[0].self_attn.q_proj = Packed()
    plain = get_peft_model(model, MoeConfig(target_modules=["q_proj"], num_experts=2))
    assert only(plain).moeadapter_A["default"].dtype == torch.float32
    model = llama()
    model.model.layers[0].self_attn.q_proj = Packed()
    with pytest.raises(InputError, match="keeps them in a form that cannot be read"):
        get_peft_model(model, MoeConfig(target_modules=["q_proj"], num_experts=2, expert_kind="dora"))
