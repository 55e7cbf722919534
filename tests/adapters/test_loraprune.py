"""LoRAPrune: the criterion against autograd, schedule and masks, a model with masks against the cut one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapters.compression.importance import by_group
from adapters.compression.loraprune import (
    LoraPrune,
    Settings,
    paper_layers,
    score,
    share,
    surrogate,
    without_lowest,
)
from adapters.compression.slicing import member_of, small_model
from adapters.compression.structure import MEMBERS
from adapters.errors import InputError
from adapters.layers.variant import base_weight, pair
from adapters.plugin import Handles
from tests.adapters.test_pruning import tiny

ALL = tuple(name.rpartition(".")[2] for name in MEMBERS)
IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(3))


class Run:
    """A small training loop with the plugin's hooks; ``rate`` of plain SGD."""

    def __init__(self, kv_heads: int = 2, settings: Settings | None = None, targets: tuple[str, ...] = ALL,
                 rank: int = 2, steps: int = 20, rate: float = 0.05, **config: Any) -> None:  # fmt: skip
        self.steps, self.rate = steps, rate
        self.plugin = LoraPrune(settings or Settings(every=2))
        self.plugin.configure(type("Config", (), {"base": "tiny", **config})())
        base = tiny(kv_heads)
        self.plugin.before_inject({"model": base})
        torch.manual_seed(7)
        self.model: Any = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets)))
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.double()
        handles = Handles({"model": self.model}, steps=steps)
        self.plugin.initialise(handles)
        self.plugin.after_inject(handles)
        self.masks: list[list[torch.Tensor]] = []

    def backward(self) -> None:
        self.model.zero_grad()
        self.model(input_ids=IDS, labels=IDS).loss.backward()

    def go(self, first: int = 0, last: int | None = None) -> Run:
        for step in range(first, self.steps if last is None else last):
            self.backward()
            self.plugin.grads_ready(step)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter -= self.rate * parameter.grad
            self.masks.append([mask.clone() for both in self.plugin.masks.values() for mask in both])
        return self


@pytest.fixture(scope="module", params=[2, 4], ids=["grouped", "one query head each"])
def done(request: pytest.FixtureRequest) -> Run:
    return Run(request.param).go()


# ------------------------------------------------------------------------------------------------ criterion


@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_the_estimate_is_one_step_of_the_product(eta: float) -> None:
    torch.manual_seed(0)
    A, B, gA, gB = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3), (4, 2), (2, 3), (4, 2)))
    wanted = (B @ A - (B - eta * gB) @ (A - eta * gA)) / eta
    torch.testing.assert_close(surrogate(A, B, gA, gB, eta), wanted, rtol=1e-12, atol=1e-12)


def test_the_score_by_hand() -> None:
    A, B = torch.tensor([[1.0, 2, 0]]), torch.tensor([[1.0], [-1]])
    gA, gB = torch.tensor([[0.0, 1, 1]]), torch.tensor([[2.0], [0]])
    found = surrogate(A, B, gA, gB)  # gB A + B gA - gB gA
    assert found.tolist() == [[2, 3, -1], [0, -1, -1]]
    weight = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    assert score(found, weight).tolist() == [[4, 36, 9], [0, 25, 36]]
    assert score(found, weight, "official").tolist() == [[2, 6, 3], [0, 5, 6]]


def test_with_an_orthonormal_A_the_estimate_is_the_true_gradient_of_a_masked_group() -> None:
    """A square and orthonormal, B = 0: s gB A = s^2 G, and sum(G o W) over columns is the gradient of their mask."""
    run = Run(targets=("o_proj", "down_proj"), rank=24)
    layers = {name: layer for name, (_, _, layer) in run.plugin.layers.items() if name.endswith("o_proj")}
    for layer in layers.values():
        A, _ = pair(layer)
        A.data = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    masks = {name: torch.ones(24, dtype=torch.float64, requires_grad=True) for name in layers}
    handles = [layer.register_forward_pre_hook(lambda _, x, m=masks[name]: (x[0] * m,))
               for name, layer in layers.items()]  # fmt: skip
    run.backward()
    for handle in handles:
        handle.remove()
    sizes = run.plugin.sizes
    for name, layer in layers.items():
        gradient = run.plugin._gradient(name, layer, 1.0) / layer.scaling["default"] ** 2
        columns = (gradient * base_weight(layer).float()).sum(0)
        torch.testing.assert_close(columns, masks[name].grad.float(), rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]
        found = member_of(name)
        assert found is not None
        heads = by_group(gradient * base_weight(layer).float(), found[1], sizes)
        wanted = masks[name].grad.reshape(2, 12).sum(1).float()  # type: ignore[union-attr]
        torch.testing.assert_close(heads, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_true_gradient_is_autograds(kv_heads: int) -> None:
    run = Run(kv_heads, Settings(criterion="gradient"))
    run.backward()
    found = run.plugin.scores()
    sizes = run.plugin.sizes
    weights = {name: layer.base_layer.weight for name, (_, _, layer) in run.plugin.layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    loss = run.model(input_ids=IDS, labels=IDS).loss
    grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    for number in range(3):
        wanted = torch.zeros(sizes.kv_heads, dtype=torch.float64)
        block, n = f"model.layers.{number}.self_attn.", sizes.repeats * 6
        one = {
            letter: (grads[f"{block}{letter}_proj"] * weights[f"{block}{letter}_proj"]).square() for letter in "qkvo"
        }
        for h in range(sizes.kv_heads):
            wanted[h] = one["k"][h * 6 : h * 6 + 6].sum() + one["v"][h * 6 : h * 6 + 6].sum()
            wanted[h] += one["q"][h * n : h * n + n].sum() + one["o"][:, h * n : h * n + n].sum()
        torch.testing.assert_close(found[number].heads, wanted.float(), rtol=1e-4, atol=1e-12)


def test_gradients_of_the_base_are_never_made(done: Run) -> None:
    assert all("lora_" in name for name, p in done.model.named_parameters() if p.grad is not None)


def test_clipping_is_that_of_the_loop() -> None:
    run = Run(max_grad_norm=0.01)
    run.backward()
    learning = [p for p in run.model.parameters() if p.grad is not None]
    factor = run.plugin._clipping()
    whole = torch.nn.utils.clip_grad_norm_(learning, 0.01)
    assert factor == pytest.approx(0.01 / float(whole), rel=1e-4)
    assert factor < 1


def test_for_small_eta_the_ranking_does_not_depend_on_the_loss_scale() -> None:
    run = Run(settings=Settings(eta=1e-9))
    run.go(0, 3).backward()
    before = run.plugin.scores()
    for parameter in run.model.parameters():
        if parameter.grad is not None:
            parameter.grad *= 64
    after = run.plugin.scores()
    for number, one in before.items():
        torch.testing.assert_close(after[number].channels, 4096 * one.channels, rtol=1e-3, atol=0)


# ------------------------------------------------------------------------------------------------ schedule and masks


def test_the_schedule() -> None:
    assert [share(t, 100, 0.5) for t in (0, 10, 90, 100)] == [0, 0, 0.5, 0.5]
    assert share(50, 100, 0.5) == pytest.approx(0.5 * (1 - 0.125))
    values = [share(t, 100, 0.5) for t in range(101)]
    assert values == sorted(values)
    assert paper_layers(32) == (3, 1)


def test_lowest_go_first_and_stay_gone() -> None:
    mask = without_lowest(torch.tensor([4.0, 1, 3, 2]), torch.ones(4, dtype=torch.bool), 2)
    assert mask.tolist() == [True, False, True, False]
    later = without_lowest(torch.tensor([0.0, 9, 9, 9]), mask, 3)
    assert later.tolist() == [False, False, True, False]
    assert without_lowest(torch.tensor([0.0, 9, 9, 9]), mask, 1).tolist() == mask.tolist()


def test_masks_are_nested_and_exact_at_the_end(done: Run) -> None:
    for before, after in itertools.pairwise(done.masks):
        assert all(bool((old | ~new).all()) for old, new in zip(before, after, strict=True))
    assert all(int((~mask).sum()) == int(len(mask) * 0.5) for mask in done.masks[-1])
    shares = [wanted for _, wanted in done.plugin.history]
    assert shares == sorted(shares)
    assert shares[-1] == 0.5
    assert done.plugin.history[-1][0] == 18
    assert done.plugin.pruning().uniform


def test_masked_model_equals_the_cut_and_merged_one(done: Run) -> None:
    pruning = done.plugin.pruning()
    with torch.no_grad():
        wanted = done.model.eval()(input_ids=IDS).logits
        merged = tiny(pruning.sizes.kv_heads)
        for name, (_, _, layer) in done.plugin.layers.items():
            A, B = pair(layer)
            merged.get_parameter(f"{name}.weight").add_(layer.scaling["default"] * B @ A)
        found = small_model(merged, pruning)(IDS).logits
        assert not torch.allclose(merged(IDS).logits, wanted, atol=1e-3)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_no_share_is_no_pruning() -> None:
    run, plain = Run(settings=Settings(ratio=0, every=1)).go(0, 4), Run(settings=Settings(ratio=0, every=1))
    assert run.plugin.masks == {}
    assert run.plugin.pruning().counts() == [(2, 40)] * 3
    assert torch.equal(plain.model(input_ids=IDS).logits, tiny(2)(IDS).logits)


def test_a_step_that_is_not_finite_is_left_out() -> None:
    run = Run().go(0, 3)
    before = {number: (one.heads.clone(), one.channels.clone()) for number, one in run.plugin.means.items()}
    run.backward()
    next(p for p in run.model.parameters() if p.grad is not None).grad[0, 0] = float("nan")
    run.plugin.grads_ready(2)
    for number, (heads, channels) in before.items():
        assert torch.equal(run.plugin.means[number].heads, heads)
        assert torch.equal(run.plugin.means[number].channels, channels)


def test_targets_without_queries_still_form_groups() -> None:
    run = Run(targets=("o_proj", "gate_proj")).go()
    assert run.plugin.pruning().counts() == [(1, 20)] * 3


def test_official_form_ends_below_the_share() -> None:
    run = Run(settings=Settings(form="official", every=2)).go()
    assert run.plugin.history[-1][0] == 16
    assert run.plugin.history[-1][1] < 0.5


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
def test_other_criteria(criterion: Any) -> None:
    assert Run(settings=Settings(criterion=criterion, every=5)).go().plugin.pruning().counts() == [(1, 20)] * 3


def test_a_resumed_run_is_the_same(done: Run) -> None:
    first = Run(done.plugin.sizes.kv_heads).go(0, 9)
    second = Run(done.plugin.sizes.kv_heads)
    second.plugin.load_state_dict(first.plugin.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    second.go(9)
    assert all(torch.equal(a, b) for a, b in zip(second.masks[-1], done.masks[-1], strict=True))
    assert second.plugin.history == done.plugin.history
    other = Run(4 if done.plugin.sizes.kv_heads == 2 else 2)
    with pytest.raises(InputError, match="other groups"):
        other.plugin.load_state_dict(first.plugin.state_dict())


# ------------------------------------------------------------------------------------------------ refusals


def test_refusals() -> None:
    for settings, text in (
        (Settings(ratio=1), "below 1"),
        (Settings(every=0), "every 0"),
        (Settings(warmup=0.5, cooldown=0.5), "no steps"),
    ):
        with pytest.raises(InputError, match=text):
            LoraPrune(settings)
    with pytest.raises(InputError, match="none to prune"):
        Run(settings=Settings(keep_first=2, keep_last=1))
    with pytest.raises(InputError, match="feed-forward"):
        Run(targets=("q_proj",))
    with pytest.raises(InputError, match="DoRA"):
        Run(use_dora=True)
