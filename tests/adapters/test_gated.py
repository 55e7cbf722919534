"""The gated engine against PEFT and against plain matrix arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from adapters.errors import InputError
from adapters.formats import LoraLayer
from adapters.layers.gated import Adapter, GatedAdapters

CPU = torch.device("cpu")


class Net(nn.Module):
    """A convolution, a strided one, a 1 x 1 one, and linear layers on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.point = nn.Conv2d(8, 8, 1)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.down(self.conv(x).relu())).flatten(2).transpose(1, 2)
        return self.second(self.first(x).tanh())


TARGETS = ("conv", "down", "point", "first", "second")


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def peft_net(configs: list[dict[str, Any]]) -> tuple[nn.Module, list[dict[str, LoraLayer]]]:
    """A PEFT-injected network with random adapters "a0", "a1", ... and the same adapters in our form."""
    model: Any = net()
    for k, config in enumerate(configs):
        model = inject_adapter_in_model(LoraConfig(target_modules=list(TARGETS), **config), model, adapter_name=f"a{k}")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
        elif "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
    model.requires_grad_(False).eval()
    made: list[dict[str, LoraLayer]] = []
    for k, config in enumerate(configs):
        layers = {}
        for name in TARGETS:
            module = model.get_submodule(name)
            key = f"a{k}"
            if key in module.lora_A:
                magnitude = module.lora_magnitude_vector[key].weight.flatten() if config.get("use_dora") else None
                alpha = float(module.lora_alpha[key])
                layers[name] = LoraLayer(
                    module.lora_A[key].weight,
                    module.lora_B[key].weight,
                    alpha,
                    bool(config.get("use_rslora")),
                    magnitude,
                )
        made.append(layers)
    return model, made


def activate(model: nn.Module, weights: dict[str, float], configs: list[dict[str, Any]]) -> None:
    """PEFT's way to say which adapters act, and how strongly."""
    for name in TARGETS:
        module: Any = model.get_submodule(name)
        module.set_adapter(list(weights))
        for key, weight in weights.items():
            module.set_scale(key, weight)


CONFIGS: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 4},
    {"r": 3, "lora_alpha": 1, "use_rslora": True},
    {"r": 4, "lora_alpha": 6, "rank_pattern": {"first": 1}, "alpha_pattern": {"conv": 2}},
]


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.7, 0, 0), (0, 1, 0), (0.3, -0.5, 2), (0, 0.4, 0.9)])
def test_joint_equals_peft(weights: tuple[float, ...], inputs: Tensor) -> None:
    model, layers = peft_net(CONFIGS)
    activate(model, {f"a{k}": w for k, w in enumerate(weights) if w != 0}, CONFIGS)
    expected = model(inputs)
    plain = net()
    engine = GatedAdapters(plain, [Adapter(layer) for layer in layers], CPU, torch.float32)
    for narrow in (True, False):
        engine.gates.narrow = narrow
        with engine.attached() as gates:
            gates.joint(weights)
            torch.testing.assert_close(plain(inputs), expected, atol=1e-5, rtol=1e-5)


def test_joint_equals_merged_weights(inputs: Tensor) -> None:
    _, layers = peft_net(CONFIGS)
    plain, merged = net(), net()
    weights = (0.5, 1.0, -0.7)
    for name in TARGETS:
        for weight, adapter in zip(weights, layers, strict=True):
            merged.get_submodule(name).weight.data += weight * adapter[name].delta()
    engine = GatedAdapters(plain, [Adapter(layer) for layer in layers], CPU, torch.float32)
    with engine.attached() as gates:
        gates.joint(weights)
        torch.testing.assert_close(plain(inputs), merged(inputs), atol=1e-5, rtol=1e-5)


def test_grouped_and_per_sample_equal_peft_mixed_batch(inputs: Tensor) -> None:
    model, layers = peft_net(CONFIGS)
    names = [name for name in ("a0", "a1", "a2") for _ in range(2)]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "adapter_names": names}), with_kwargs=True
        )
        for name in TARGETS
    ]
    expected = model(inputs)
    for hook in hooks:
        hook.remove()
    plain = net()
    engine = GatedAdapters(plain, [Adapter(layer) for layer in layers], CPU, torch.float32)
    with engine.attached() as gates:
        gates.grouped([0, 1, 2], [1, 1, 1])
        torch.testing.assert_close(plain(inputs), expected, atol=1e-5, rtol=1e-5)
        gates.per_sample(torch.eye(3).repeat_interleave(2, 0))
        torch.testing.assert_close(plain(inputs), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    adapters=st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=3, unique=True),
    strengths=st.lists(st.floats(-2, 2), min_size=3, max_size=3),
)
def test_any_group_equals_its_adapters_alone(adapters: list[int], strengths: list[float]) -> None:
    _, layers = peft_net(CONFIGS)
    del layers[1]["conv"], layers[2]["second"]  # an adapter that lacks a layer has zero columns there
    inputs = torch.randn(len(adapters) * 2, 3, 8, 8)
    plain = net()
    engine = GatedAdapters(plain, [Adapter(layer) for layer in layers], CPU, torch.float32)
    with engine.attached() as gates:
        gates.grouped(adapters, strengths[: len(adapters)])
        together = plain(inputs)
        for k, (adapter, strength) in enumerate(zip(adapters, strengths, strict=False)):
            gates.joint([strength if i == adapter else 0.0 for i in range(3)])
            alone = plain(inputs[2 * k : 2 * k + 2])
            torch.testing.assert_close(together[2 * k : 2 * k + 2], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_dora_equals_peft(weight: float, inputs: Tensor) -> None:
    configs: list[dict[str, Any]] = [{"r": 2, "lora_alpha": 4, "use_dora": True}, {"r": 2, "lora_alpha": 2}]
    model, layers = peft_net(configs)
    plain = net()
    adapters = [Adapter(layers[0], strength=weight), Adapter(layers[1])]
    engine = GatedAdapters(plain, adapters, CPU, torch.float32)
    activate(model, {"a0": weight}, configs)
    alone = model(inputs)
    activate(model, {"a0": weight, "a1": 0.5}, configs)
    both = model(inputs)
    with engine.attached() as gates:
        gates.joint([1, 0])
        torch.testing.assert_close(plain(inputs), alone, atol=1e-5, rtol=1e-5)
        gates.joint([1, 0.5])
        torch.testing.assert_close(plain(inputs), both, atol=1e-5, rtol=1e-5)
        gates.joint([0, 0])
        assert torch.equal(plain(inputs), net()(inputs))
        gates.grouped([0, 1], [1, 0.5])
        torch.testing.assert_close(plain(inputs)[:3], alone[:3], atol=1e-5, rtol=1e-5)


def engine_of_two() -> tuple[Net, GatedAdapters]:
    _, layers = peft_net(CONFIGS[:2])
    plain = net()
    return plain, GatedAdapters(plain, [Adapter(layer) for layer in layers], CPU, torch.float32)


def test_zero_gates_are_the_base_bitwise(inputs: Tensor) -> None:
    plain, engine = engine_of_two()
    with engine.attached() as gates:
        gates.joint([0, 0])
        assert torch.equal(plain(inputs), net()(inputs))


def test_order_of_adapters_does_not_matter(inputs: Tensor) -> None:
    _, layers = peft_net(CONFIGS)
    results = []
    for order in ((0, 1, 2), (2, 0, 1)):
        plain = net()
        engine = GatedAdapters(plain, [Adapter(layers[i]) for i in order], CPU, torch.float32)
        with engine.attached() as gates:
            gates.joint([(1.0, 0.5, 0.2)[i] for i in order])
            results.append(plain(inputs))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_block_factor_scales_one_module(inputs: Tensor) -> None:
    _, layers = peft_net(CONFIGS[:1])
    halved = {name: LoraLayer(a.A, a.B, a.alpha * (0.5 if name == "first" else 1.0)) for name, a in layers[0].items()}
    results = []
    for adapter in (Adapter(layers[0], factors={"first": 0.5}), Adapter(halved)):
        plain = net()
        with GatedAdapters(plain, [adapter], CPU, torch.float32).attached() as gates:
            gates.joint([1.0])
            results.append(plain(inputs))
    torch.testing.assert_close(*results)


def test_token_gates(inputs: Tensor) -> None:
    """A mask of ones changes nothing; a mask of zeros gives the base; masks are strengths per token and adapter."""
    plain, engine = engine_of_two()

    def masked(value: Callable[[int], Tensor]) -> Tensor:
        with engine.attached() as gates:
            gates.joint([1.0, 1.0])
            gates.token_gates = lambda name, tokens: value(tokens)
            return plain(inputs)

    with engine.attached() as gates:
        gates.joint([1.0, 1.0])
        both = plain(inputs)
        gates.joint([1.0, 0.0])
        first = plain(inputs)
    torch.testing.assert_close(masked(lambda n: torch.ones(n, 2)), both)
    torch.testing.assert_close(masked(lambda n: torch.zeros(n, 2)), net()(inputs))
    torch.testing.assert_close(masked(lambda n: torch.tensor([[1.0, 0.0]]).expand(n, 2)), first, atol=1e-5, rtol=1e-5)


def test_token_gates_act_where_the_mask_says() -> None:
    """On a single linear layer, masked tokens are the base's and the others the adapter's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).requires_grad_(False)
    layer = LoraLayer(torch.randn(2, 4), torch.randn(3, 2), 2.0)
    x = torch.randn(2, 6, 4)
    base = model(x)
    with GatedAdapters(model, [Adapter({"0": layer})], CPU, torch.float32).attached() as gates:
        gates.joint([1.0])
        full = model(x)
        gates.token_gates = lambda name, tokens: (torch.arange(tokens) < 3).float()[:, None]
        part = model(x)
    torch.testing.assert_close(part[:, :3], full[:, :3])
    torch.testing.assert_close(part[:, 3:], base[:, 3:])


def test_model_is_untouched_afterwards(inputs: Tensor) -> None:
    plain, engine = engine_of_two()
    before = copy.deepcopy(plain.state_dict())
    modules = {name: id(module) for name, module in plain.named_modules()}

    def fails() -> None:
        with engine.attached() as gates:
            gates.joint([1.0, 1.0])
            plain(inputs)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert modules == {name: id(module) for name, module in plain.named_modules()}
    assert all(torch.equal(before[name], tensor) for name, tensor in plain.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert torch.equal(plain(inputs), net()(inputs))


def test_gradients_flow_when_they_are_wanted() -> None:
    """The output is written in place only where no gradient needs it (regions and refinement need it)."""
    plain, engine = engine_of_two()
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    with engine.attached() as gates:
        gates.joint([1.0, 0.5])
        plain(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_changing_gates_keeps_the_memory_it_lives_in() -> None:
    """A captured CUDA graph reads the gates from where they were."""
    plain, engine = engine_of_two()
    engine.gates.narrow = False
    with engine.attached() as gates, torch.no_grad():
        gates.joint([1.0, 0.5])
        plain(torch.randn(1, 3, 8, 8))
        places = {ranks: columns.data_ptr() for ranks, columns in gates._columns.items()}
        gates.joint([0.0, 2.0])
        assert places == {ranks: columns.data_ptr() for ranks, columns in gates._columns.items()}
        assert all(columns.max() == 2.0 for columns in gates._columns.values())


def test_changing_gates_compiles_nothing_again(inputs: Tensor) -> None:
    """With fixed shapes (narrow = False) the gates are data: one compiled graph serves every strength."""
    from torch._dynamo.testing import CompileCounter

    _, layers = peft_net(CONFIGS[:2])
    plain = net()
    engine = GatedAdapters(plain, [Adapter(layer) for layer in layers], CPU, torch.float32, narrow=False)
    counter = CompileCounter()
    with engine.attached() as gates, torch.no_grad():
        gates.joint([1.0, 0.5])
        compiled = torch.compile(plain, backend=counter)
        for strengths in ([1.0, 0.5], [0.0, 2.0], [0.3, 0.3], [0.0, 0.0]):
            gates.joint(strengths)
            torch.testing.assert_close(compiled(inputs), plain(inputs))
    assert counter.frame_count == 1


def test_large_scales_stay_finite_in_half_precision() -> None:
    """Where s B overflows fp16, the scale moves to A."""
    model = nn.Sequential(nn.Linear(4, 3)).half()
    layer = LoraLayer(torch.full((1, 4), 1e-4), torch.full((3, 1), 100.0), alpha=4000.0)
    engine = GatedAdapters(model, [Adapter({"0": layer})], CPU, torch.float16)
    assert torch.isfinite(engine.layers[0].B).all()
    product = engine.layers[0].B.float().T @ engine.layers[0].A.float()
    torch.testing.assert_close(product, layer.delta(), rtol=2e-3, atol=0)
    hopeless = LoraLayer(torch.full((1, 4), 1e4), torch.full((3, 1), 1e4), alpha=1e6)
    with pytest.raises(InputError, match="too large"):
        GatedAdapters(model, [Adapter({"0": hopeless})], CPU, torch.float16)


def test_memory_is_the_sum_of_ranks_not_of_weights() -> None:
    _, engine = engine_of_two()
    assert engine.nbytes() == 4 * sum(
        (2 + 3) * (module.weight[0].numel() + module.weight.shape[0])
        for module in (net().get_submodule(name) for name in TARGETS)
    )


@pytest.mark.parametrize("dora", [False, True])
def test_positions_in_front_are_positions_all_the_same(dora: bool) -> None:
    """Inputs (L, batch, width) with gates per position, against (batch, L, width)."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 4)).requires_grad_(False)
    magnitude = torch.rand(4) + 1 if dora else None
    layers = [LoraLayer(torch.randn(2, 6), torch.randn(4, 2), 2.0, magnitude=magnitude) for _ in range(2)]
    engine = GatedAdapters(model, [Adapter({"0": layer}) for layer in layers], CPU, torch.float32)
    x, gates = torch.randn(3, 5, 6), torch.rand(5, 2)
    with engine.attached() as acting:
        acting.joint([1.0, 1.0])
        acting.tokens_to(lambda name, tokens: gates if tokens == 5 else None)
        wanted = model(x)
        acting.tokens_to(lambda name, tokens: gates if tokens == 5 else None, lambda name: name == "0")
        found = model(x.transpose(0, 1).contiguous())
    torch.testing.assert_close(found.transpose(0, 1), wanted)
