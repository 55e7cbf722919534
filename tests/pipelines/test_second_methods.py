"""K-LoRA, W-Switch, W-Composite and CMLoRA: their limits, their arithmetic, what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from adapters.errors import InputError
from adapters.formats.lora import LoraLayer
from pipelines.diffusion.methods import cmlora, k_lora, w_composite, w_switch
from pipelines.diffusion.methods.context import MethodContext, normalised, without
from tests import tiny
from tests.pipelines.conftest import PROMPT, Bed, close, latents

TRIGGERS = {"a": ("red",), "b": ("apple",), "c": ("a",)}


def composer(bed: Bed, *names: str, **weights: float) -> Any:
    made = bed.composer()
    for name in names:
        made.load_lora(bed.files[name], name, weight=weights.get(name, 1.0), triggers=TRIGGERS[name])
    return made


def context(prompt: str | None = "one two", *triggers: str) -> MethodContext:
    """Texts are embedded as what words they have: one axis per word."""
    words = ["one", "two", "three", "four"]

    def embed(text: str) -> torch.Tensor:
        return torch.tensor([1.0 if word in text.split() else 0.01 for word in words])

    names = tuple(f"n{k}" for k in range(len(triggers)))
    return MethodContext(names, tuple({} for _ in names), tuple((word,) for word in triggers), prompt, embed)


# The limits they share


@pytest.mark.parametrize("method", ["w-switch", "w-composite", "cmlora"])
@pytest.mark.parametrize("family", tiny.PICTURES)
def test_one_adapter_is_plain_lora(method: str, family: str, beds: Callable[[str], Bed]) -> None:
    bed = beds(family)
    close(latents(composer(bed, "a", a=0.7), method), latents(composer(bed, "a", a=0.7), "merge"))


@pytest.mark.parametrize("method", ["w-composite", "cmlora"])
def test_identical_adapters_are_one(method: str, sd: Bed) -> None:
    both = composer(sd, "a")
    both.load_lora(sd.files["a"], "again", triggers=("red",))
    close(latents(both, method), latents(composer(sd, "a"), "merge"), 1e-4)


@pytest.mark.parametrize("method", ["w-composite", "cmlora"])
def test_the_order_of_adapters_does_not_matter(method: str, sd: Bed) -> None:
    options = {"tau": 9} if method == "cmlora" else {}  # one leader, told by its frequencies and not by its place
    one, other = latents(composer(sd, "a", "b"), method, **options), latents(composer(sd, "b", "a"), method, **options)
    close(one, other, 1e-4)


@pytest.mark.parametrize("method", ["w-switch", "w-composite", "cmlora", "k-lora"])
def test_the_pipeline_is_left_as_it_was(method: str, sd: Bed) -> None:
    made = composer(sd, "a", "b")
    before = latents(made, "merge")
    latents(made, method)
    assert torch.equal(latents(made, "merge"), before)


# W-Switch and W-Composite


def test_relevance_of_the_turns() -> None:
    assert without("a Red apple, red, on redwood", ("red",)) == "a apple, on redwood"
    assert normalised([0.0, 0.15]) == pytest.approx((0.25, 0.75))
    assert w_switch.lengths((0.25, 0.75), 6) == [2, 6]
    assert w_switch.lengths((0.01, 0.99), 3) == [1, 3]
    close_words = context("one two three", "one", "nothing")
    one, nothing = w_switch.weights(close_words)
    assert one > nothing  # taking away what is not there changes nothing
    assert sum(w_switch.weights(close_words)) == pytest.approx(1)
    strengths = ((1.0, 1.0),) * 6
    made = w_switch.steps(strengths, close_words, tau=2)
    assert [step.active[0] for step in made] == [0, 0, 1, 0, 0, 1]
    planned = w_switch.steps(strengths, context(None, "one", "two"), tau=2)
    assert [step.active[0] for step in planned] == [0, 0, 1, 1, 0, 0]


def test_shares_of_the_weighted_mean() -> None:
    near, far = w_composite.weights(context("one two", "one", "four"))
    assert near > far
    predictions = torch.arange(8.0).view(4, 2)  # two adapters, batch of two
    found = w_composite.weighted(predictions, [1.0, 3.0])
    torch.testing.assert_close(found, 0.25 * predictions[:2] + 0.75 * predictions[2:])


def test_w_composite_with_equal_shares_is_composite(sd: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w_composite, "weights", lambda context: (0.5, 0.5))
    close(latents(composer(sd, "a", "b"), "w-composite"), latents(composer(sd, "a", "b"), "composite"))
    monkeypatch.setattr(w_composite, "weights", lambda context: (1.0, 0.0))
    close(latents(composer(sd, "a", "b"), "w-composite"), latents(composer(sd, "a"), "merge"))
    close(
        latents(composer(sd, "a", "b"), "w-composite", adapter_batch=1), latents(composer(sd, "a", "b"), "w-composite")
    )


def test_w_switch_with_equal_relevance_is_switch(sd: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w_switch, "weights", lambda context: (0.5, 0.5))
    assert torch.equal(
        latents(composer(sd, "a", "b"), "w-switch", tau=2), latents(composer(sd, "a", "b"), "switch", tau=2)
    )


def test_adapters_without_triggers_are_refused(sd: Bed) -> None:
    for method in ("w-switch", "w-composite"):
        with pytest.raises(InputError, match="give a, b triggers"):
            latents(sd.composer("a", "b"), method)


# CMLoRA


def test_cmlora_shares_and_refreshes() -> None:
    assert cmlora.shares(1, 0) == [1.0]
    found = cmlora.shares(3, 1)
    assert sum(found) == pytest.approx(1)
    assert found[1] == pytest.approx(2.5 * found[0])  # a = N - 1/2
    steps = cmlora.steps(((1.0, 1.0),) * 16)
    assert [k for k, step in enumerate(steps) if step.forwards == 2] == [0, 2, 4, 7, 10, 13, 15]
    changing: list[Any] = cmlora.steps(((1.0, 1.0), (1.0, 1.0), (1.0, 0.5), (1.0, 0.0)))
    assert [(step.refresh, step.forwards) for step in changing] == [(True, 2), (False, 1), (False, 1), (True, 1)]


def test_cmlora_without_reuse_is_the_weighted_mean(sd: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cmlora, "interval", lambda progress: 1)
    monkeypatch.setattr(cmlora, "high_frequency", lambda difference: 0.0)
    monkeypatch.setattr(w_composite, "weights", lambda context: tuple(cmlora.shares(2, 0)))
    close(latents(composer(sd, "a", "b"), "cmlora", tau=9), latents(composer(sd, "a", "b"), "w-composite"))


def test_cmlora_reuse_is_near_the_full_composition_and_cheaper(sd: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    made = composer(sd, "a", "b")
    reused = latents(made, "cmlora", tau=9)
    assert made.plan(steps=4).forwards == 6
    monkeypatch.setattr(cmlora, "interval", lambda progress: 1)
    full = latents(made, "cmlora", tau=9)
    error = float((reused - full).norm() / full.norm())
    assert 0 < error < 0.5


def test_high_frequency_content() -> None:
    x = torch.arange(16.0)
    slow, fast = torch.sin(2 * torch.pi * x / 16), torch.cos(torch.pi * x)
    assert cmlora.high_frequency(slow.expand(1, 1, 16, 16)) < 1e-6
    assert cmlora.high_frequency(fast.expand(1, 1, 16, 16)) > 0.99
    assert cmlora.high_frequency(torch.zeros(1, 4, 3)) == 0.0
    assert cmlora.high_frequency(fast[None, :, None]) > 0.99  # tokens


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_cmlora_on_flux_with_two_calls_per_step(guidance: float, beds: Callable[[str], Bed]) -> None:
    made = composer(beds("flux"), "a", "b")
    found = latents(made, "cmlora", true_cfg_scale=guidance, negative_prompt="blue")
    assert bool(torch.isfinite(found).all())


# K-LoRA


def layer(seed: int, size: float = 1.0) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    return LoraLayer(torch.randn(2, 6, generator=generator), size * torch.randn(5, 2, generator=generator), alpha=3.0)


def test_crossings_are_where_the_papers_comparison_turns() -> None:
    concept = {str(k): layer(k, 0.5 + 0.3 * k) for k in range(6)}
    style = {str(k): layer(k + 50, 1.5 - 0.2 * k) for k in range(6)}
    found = k_lora.crossings(concept, style)
    ratios = [float(concept[n].delta().abs().sum() / style[n].delta().abs().sum()) for n in concept]
    gamma = k_lora.balance(ratios)
    for name, place in found.items():
        S = [sum(sorted(one[name].delta().abs().flatten().tolist(), reverse=True)[:4]) for one in (concept, style)]
        for u in (0.0, 0.2, 0.5, 0.8, 0.99):
            assert (u <= place) == (S[0] / gamma >= S[1] * (1.5 * u + 0.5))


def test_outliers_leave_the_balance() -> None:
    assert k_lora.balance([1.0, 1.2, 0.8, 50.0]) == pytest.approx(1.0)
    assert k_lora.balance([]) == 1.0


def test_k_lora_goes_from_concept_to_style(sd: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    made = composer(sd, "a", "b")
    plan = made.compose("k-lora").plan(steps=8)
    counts = [sum(style for _, style in step.layers.values()) for step in plan.steps]  # type: ignore[attr-defined]
    assert counts == sorted(counts)
    assert plan.forwards == 8
    for place, only in ((2.0, "a"), (-1.0, "b")):
        monkeypatch.setattr(k_lora, "crossings", lambda c, s, place=place: dict.fromkeys(c, place))
        close(latents(made, "k-lora", te_mode="merged"), _alone(sd, only))


def _alone(bed: Bed, only: str) -> torch.Tensor:
    """Both adapters in the text encoders, one in the denoiser."""
    made = bed.composer()
    for name in ("a", "b"):
        made.load_lora(bed.files[name], name, weight=1.0 if name == only else 0.0, te_weight=1.0)
    return latents(made, "merge")


@pytest.mark.parametrize("family", [name for name in tiny.PICTURES if name != "sd"])
def test_k_lora_draws_with_every_family(family: str, beds: Callable[[str], Bed]) -> None:
    bed = beds(family)
    found = latents(composer(bed, "a", "b"), "k-lora")
    assert float((found - latents(composer(bed, "a", "b"), "merge")).abs().max()) > 0


def test_k_lora_refusals(sd: Bed) -> None:
    with pytest.raises(InputError, match="two adapters, not 3"):
        latents(composer(sd, "a", "b", "c"), "k-lora")
    with pytest.raises(InputError, match="same layers"):
        latents(composer(sd, "a", "c"), "k-lora")
    with pytest.raises(InputError, match="use 'merged' with k-lora"):
        composer(sd, "a", "b").compose("k-lora", te_mode="per_adapter")
    assert PROMPT
