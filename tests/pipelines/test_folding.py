"""Calls with adapters inside the weights, against the same calls with adapters beside them (which the other tests
compare with diffusers and PEFT)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.errors import Cancelled
from pipelines.diffusion import MultiLoRAPipeline, pipeline
from pipelines.diffusion.folding import ENOUGH
from tests import tiny
from tests.pipelines.conftest import PROMPT, Bed, latents
from tests.pipelines.test_composition import Watcher, state

SINGLE = ("z-image", "sana")
"""Families whose pipeline keeps latents in single precision."""

STEPS = 2 * ENOUGH
"""So that each of two adapters in turns acts in enough of them."""


def inside(composer: MultiLoRAPipeline) -> int:
    """Modules that compute with other weights than their own."""
    return sum("forward" in vars(module) for module in composer.rack.denoiser.modules())


def weights(composer: MultiLoRAPipeline) -> list[Tensor]:
    return [weight.clone() for weight in composer.rack.denoiser.state_dict().values()]


def same(first: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("family", tiny.PICTURES)
@pytest.mark.parametrize("method", ["merge", "switch", "composite"])
def test_folded_pictures_are_the_others_up_to_rounding(beds: Callable[[str], Bed], family: str, method: str) -> None:
    composer = beds(family).composer("a", "b", "c", b=0.6, c=-0.4)
    chosen = {"adapters": ["a", "c"]} if method == "switch" else {}
    own, seen = weights(composer), []

    def look(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(inside(composer))
        assert same(own, weights(composer))
        return {}

    options = {"steps": STEPS, "images": 2, "callback_on_step_end": look}
    pictures = [
        composer.compose(method, fold=fold, **chosen)(
            PROMPT, seed=3, width=32, height=32, output_type="pt", **options
        ).images
        for fold in (True, False)
    ]
    assert min(seen[:STEPS]) > 0
    assert max(seen[STEPS:]) == 0
    assert float((pictures[0] - pictures[1]).abs().max()) <= 1e-4
    assert composer.compose(method, fold=True, **chosen).plan(STEPS).folds.memory > 0


@pytest.mark.parametrize("family", tiny.PICTURES)
@pytest.mark.parametrize("method", ["merge", "composite"])
def test_in_double_precision_nothing_is_left_of_the_difference(
    beds: Callable[[str], Bed], family: str, method: str
) -> None:
    composer = beds(family).composer("a", "b", b=0.6)
    for part in composer.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.double()
    folded, unfolded = (latents(composer, method, steps=ENOUGH, fold=fold) for fold in (True, False))
    assert folded.dtype == (torch.float32 if family in SINGLE else torch.float64)
    assert float((folded - unfolded).abs().max() / unfolded.abs().max()) <= (1e-5 if family in SINGLE else 1e-9)
    assert composer.plan(ENOUGH).folds.memory == 0  # of the last call, which was asked not to


def test_tinymoji_draws_the_same() -> None:
    from benchmarks import composition as benchmark

    ours = benchmark.Ours(benchmark.tinymoji(), benchmark.adapters(benchmark.tinymoji(), 2))
    for composer, method in ((ours.merged, "merge"), (ours.alone, "composite")):
        pictures = [
            composer.compose(method, fold=fold)(PROMPT, steps=ENOUGH, seed=1, output_type="pt").images
            for fold in (True, False)
        ]
        assert float((pictures[0] - pictures[1]).abs().max()) <= 1e-4


def test_what_is_folded(sd: Bed) -> None:
    """Settings that hold in enough calls, whether in a row or not; the rest by hooks."""
    composer = sd.composer("a", "b")

    def settings(steps: int, method: str = "merge", **options: Any) -> list[Any]:
        return list(composer.compose(method, **options).plan(steps).folds.settings)

    assert settings(ENOUGH) == [((1.0, 1.0),)]
    assert settings(ENOUGH - 1) == []
    assert settings(ENOUGH, fold=False) == []
    assert settings(2 * ENOUGH, "switch") == [((1.0, 0.0),), ((0.0, 1.0),)]
    assert settings(ENOUGH, "composite") == [((1.0, 0.0), (0.0, 1.0))]
    assert settings(ENOUGH, "composite", adapter_batch=1) == [((1.0, 0.0),), ((0.0, 1.0),)]
    assert settings(2 * ENOUGH, "cmlora") == []  # what it does depends on what it sees
    composer.load_lora(sd.files["c"], "c", schedule=[(0, 0.5), (0.5, 0.5), (0.5, 0), (0.75, 0), (1, 1)])
    assert settings(4 * ENOUGH) == [((1.0, 1.0, 0.5),), ((1.0, 1.0, 0.0),)]  # two plateaus; what rises is no setting
    folded = latents(composer.compose("merge"), steps=4 * ENOUGH)
    torch.testing.assert_close(folded, latents(composer, "merge", steps=4 * ENOUGH, fold=False), atol=1e-4, rtol=1e-4)


def test_without_room_adapters_stay_beside_the_weights(sd: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    composer = sd.composer("a", "b")
    needed = composer.compose("merge").plan(ENOUGH).folds.memory
    touched = {layer.name for layer in composer.joined().denoiser.layers}
    assert needed == sum(composer.pipe.unet.get_submodule(name).weight.nbytes for name in touched)
    assert composer.compose("composite").plan(ENOUGH).folds.memory == 2 * needed
    unfolded = latents(composer, "merge", steps=ENOUGH, fold=False)
    monkeypatch.setattr(pipeline, "free", lambda device: needed)
    plan = composer.compose("merge").plan(ENOUGH)
    assert (plan.folds.settings, plan.folds.missing) == ((), needed)
    assert "not enough memory" in str(plan)
    assert torch.equal(latents(composer, steps=ENOUGH), unfolded)


@pytest.mark.parametrize("left", [1, 100, 300])
@pytest.mark.parametrize("problem", [KeyboardInterrupt, ZeroDivisionError])
def test_everything_is_restored(sd: Bed, problem: type[BaseException], left: int) -> None:
    """Also when it comes in the middle of the denoiser: at the first layer, while weights are made, or later."""
    composer = sd.composer("a", "b")
    before, own = state(composer), weights(composer)

    def count(*args: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            assert inside(composer) > 0
            raise problem

    layers = [composer.pipe.unet.get_submodule(layer.name) for layer in composer.joined().denoiser.layers]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with pytest.raises(problem):
        latents(composer, "merge", steps=4 * ENOUGH)
    for hook in hooks:
        hook.remove()
    assert left == 0
    assert state(composer) == before
    assert same(own, weights(composer))
    assert torch.equal(latents(composer, "merge", steps=ENOUGH), latents(sd.composer("a", "b"), "merge", steps=ENOUGH))


def test_a_stop_restores_everything(sd: Bed) -> None:
    composer = sd.composer("a", "b")
    before, own = state(composer), weights(composer)
    for method in ("merge", "composite"):
        with pytest.raises(Cancelled):
            latents(composer, method, steps=ENOUGH, monitor=Watcher(stop_after=2))
        assert state(composer) == before
        assert same(own, weights(composer))


def test_pipelines_share_models_in_turns_and_in_threads(sd: Bed) -> None:
    """Other adapters and weights between calls, another pipeline of the same models, a call in another thread."""
    first = sd.composer("a")
    second = MultiLoRAPipeline(first.pipe)
    second.load_lora(sd.files["b"], "b")
    call = {"steps": ENOUGH}
    wanted = {name: latents(sd.composer(name), "merge", **call) for name in "ab"}
    weak = latents(sd.composer("a", a=0.5), "merge", **call)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(latents(second, "merge", **call)))
    thread.start()
    thread.join()
    assert torch.equal(latents(first, "merge", **call), wanted["a"])
    assert torch.equal(found[0], wanted["b"])
    assert torch.equal(latents(first, prompt=f"{PROMPT} <lora:a:0.5>", **call), weak)
    first.unload_lora("a")
    first.load_lora(sd.files["b"], "a")
    assert torch.equal(latents(first, "merge", **call), wanted["b"])


def test_a_picture_inside_a_picture(sd: Bed) -> None:
    """A callback may draw with the base alone; the call that it stands in goes on as it was."""
    composer = sd.composer("a")
    plain = latents(composer, "merge", steps=ENOUGH)
    bare = tiny.sd()

    def draw(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        bare.unet.load_state_dict(pipe.unet.state_dict())
        return {}

    assert torch.equal(latents(composer, steps=ENOUGH, callback_on_step_end=draw), plain)
    assert same(list(bare.unet.state_dict().values()), weights(sd.composer()))


def test_the_matrices_are_joined_once(sd: Bed) -> None:
    composer = sd.composer("a", "b").compose("merge")
    latents(composer)
    joined = composer.joined()
    latents(composer, prompt=f"{PROMPT} <lora:a:0.5>")
    assert composer.joined() is joined
