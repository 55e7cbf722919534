"""Adapters inside the weights, against weights that are merged by hand, and what is left of it afterwards: nothing."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.formats import LoraLayer
from adapters.layers.folded import Blocks
from adapters.layers.gated import Adapter, GatedAdapters, alone
from tests.adapters.test_gated import CONFIGS, CPU, TARGETS, Net, net, peft_net

SUMMED: Blocks = ((0.5, 1.0, -0.7),)
APART = alone([2, 0], [0.6, -1.5], 3)


@pytest.fixture(scope="module")
def layers() -> list[dict[str, LoraLayer]]:
    made = peft_net(CONFIGS)[1]
    del made[0]["down"]  # one that the others have
    return made


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def engine(model: nn.Module, layers: list[dict[str, LoraLayer]]) -> GatedAdapters:
    return GatedAdapters(model, [Adapter(layer) for layer in layers], CPU, next(model.parameters()).dtype)


def merged(layers: list[dict[str, LoraLayer]], strengths: tuple[float, ...]) -> Net:
    """The network with the sum in its weights."""
    made = net()
    for strength, adapter in zip(strengths, layers, strict=True):
        for name, layer in adapter.items():
            made.get_submodule(name).weight.data += strength * layer.delta()
    return made


def set_gates(gates: Any, blocks: Blocks) -> None:
    if len(blocks) == 1:
        gates.joint(blocks[0])
    else:
        gates.grouped([2, 0], [0.6, -1.5])


def inside(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def state(model: nn.Module) -> list[Any]:
    modules = [(list(vars(module)), len(module._forward_hooks)) for module in model.modules()]
    return [*modules, *((weight.data_ptr(), weight._version) for weight in model.parameters())]


@pytest.mark.parametrize("blocks", [SUMMED, APART], ids=["summed", "apart"])
def test_folded_equals_merged_weights(layers: list[dict[str, LoraLayer]], inputs: Tensor, blocks: Blocks) -> None:
    plain = net()
    before = state(plain)
    parts = [merged(layers, strengths)(part) for strengths, part in zip(blocks, inputs.chunk(len(blocks)), strict=True)]
    with engine(plain, layers).attached(fold=[blocks]) as gates:
        set_gates(gates, blocks)
        for _ in range(2):  # the first call makes the weights
            torch.testing.assert_close(plain(inputs), torch.cat(parts), atol=1e-5, rtol=1e-5)
        assert inside(plain) == list(TARGETS)
        assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), net().parameters(), strict=True))
        gates.off()
        assert inside(plain) == []
        assert torch.equal(plain(inputs), net()(inputs))
        gates.joint((0.0, 1.0, 0.0))  # not to be folded: by hooks
        torch.testing.assert_close(plain(inputs), merged(layers, (0, 1, 0))(inputs), atol=1e-5, rtol=1e-5)
        set_gates(gates, blocks)
        assert inside(plain) == list(TARGETS)
        torch.testing.assert_close(plain(inputs), torch.cat(parts), atol=1e-5, rtol=1e-5)
        gates.tokens_to(lambda name, tokens: torch.zeros(1, 3))  # strengths by place are no sum
        assert inside(plain) == []
    assert state(plain) == before


def test_dora_is_folded_at_its_weight(inputs: Tensor) -> None:
    model, layers = peft_net([{"r": 2, "lora_alpha": 4, "use_dora": True}, {"r": 3, "lora_alpha": 1}])
    plain = net()
    for name in TARGETS:
        module: Any = model.get_submodule(name)
        module.set_adapter(["a0"])
    with engine(plain, layers).attached(fold=[((1.0, 0.0),)]) as gates:
        gates.joint((1.0, 0.0))
        torch.testing.assert_close(plain(inputs), model(inputs), atol=1e-5, rtol=1e-5)
        assert inside(plain) == list(TARGETS)


def test_deep_layers_of_small_pictures_stay_beside_their_weights(layers: list[dict[str, LoraLayer]]) -> None:
    """A weight per block is no gain where a block has few positions; what comes out is the same."""
    plain, few = net(), torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(5))
    parts = [merged(layers, strengths)(part) for strengths, part in zip(APART, few.chunk(2), strict=True)]
    with engine(plain, layers).attached(fold=[APART]) as gates:
        set_gates(gates, APART)
        for _ in range(2):
            torch.testing.assert_close(plain(few), torch.cat(parts), atol=1e-5, rtol=1e-5)
        assert {vars(module)["forward"].__name__ for module in plain.children()} == {"beside"}


@pytest.mark.parametrize(("dtype", "weak"), [(torch.float16, 3e-5), (torch.bfloat16, 2e-4)])
def test_sums_are_rounded_once_and_weak_changes_are_not_lost(dtype: torch.dtype, weak: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, generator=generator).to(dtype)
    A, B = torch.randn(2, 64, generator=generator), torch.randn(64, 2, generator=generator)
    for strength in (1.0, weak):
        model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(dtype).requires_grad_(False)
        own = model[0].weight.double()
        layer = LoraLayer(A.to(dtype), (B * strength).to(dtype), 2.0)
        exact = own + layer.delta().double()
        found = []
        for fold in ([], [((1.0,),)]):
            with engine(model, [{"0": layer}]).attached(fold=fold) as gates:
                gates.joint((1.0,))
                found.append(model(x))
                weight = getattr(vars(model[0]).get("forward"), "keywords", {}).get("weight")
        nearest = exact.to(dtype).double()
        if strength == 1.0:
            assert weight is not None
            assert ((weight.double() - exact).abs() <= 1.001 * (nearest - exact).abs() + 1e-7).all()
        else:  # in these bits a quarter of the change or more would be lost
            assert (nearest - exact).norm() > 0.2 * (exact - own).norm()
            assert weight is None
            assert torch.equal(*found)


def test_modules_that_compute_in_their_own_way_are_left_to_hooks(inputs: Tensor) -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layers = peft_net(CONFIGS)[1]
    plain = net()
    plain.first = Odd(8, 12)
    by_hooks = engine(plain, layers)
    with by_hooks.attached() as gates:
        gates.joint(SUMMED[0])
        wanted = plain(inputs)
    with by_hooks.attached(fold=[SUMMED]) as gates:
        gates.joint(SUMMED[0])
        torch.testing.assert_close(plain(inputs), wanted, atol=1e-5, rtol=1e-5)
        ordinary = [name for name in TARGETS if name != "first"]
        assert inside(plain) == ordinary
    assert by_hooks.foldable_bytes() == sum(plain.get_submodule(name).weight.nbytes for name in ordinary)


def test_an_interrupt_at_any_line_leaves_the_model_as_it_was(
    layers: list[dict[str, LoraLayer]], inputs: Tensor
) -> None:
    """Control-C comes anywhere in the engine: while weights are made, in use, changed, or taken away."""
    plain = net()
    before, wanted = state(plain), net()(inputs)
    made = engine(plain, [{name: layer[name] for name in ("point", "first")} for layer in layers])
    weights = len(list(plain.parameters()))

    def run() -> None:
        with made.attached(fold=[SUMMED, APART]) as gates:
            for blocks in (SUMMED, APART):
                set_gates(gates, blocks)
                plain(inputs)

    run()
    step, done = 1, False
    while not done:
        left = step

        def line(frame: Any, event: str, argument: Any) -> Any:
            nonlocal left
            if event == "line":
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return line

        def call(frame: Any, event: str, argument: Any) -> Any:
            return line if frame.f_code.co_filename.endswith(("layers/gated.py", "layers/folded.py")) else None

        sys.settrace(call)
        try:
            run()
            done = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert inside(plain) == [], step
        assert state(plain)[-weights:] == before[-weights:]
        assert torch.equal(plain(inputs), wanted), step
        step += 1
    assert step > 100
    assert state(plain) == before
