"""LoRA-Composer's parts: masks, capture, re-initialisation, refinement, and what a call leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapters.errors import Cancelled, InputError
from pipelines.diffusion.regions import Region, RegionOptions
from pipelines.diffusion.regions.capture import Capture, capture_factor, factors, maps
from pipelines.diffusion.regions.masks import Place, level, level_of
from pipelines.diffusion.regions.refine import Refinement, gaussian_hill, limited, loss, smooth
from pipelines.diffusion.regions.reinit import best_window, rearranged
from pipelines.diffusion.regions.run import Attending, RegionalCall
from tests import tiny
from tests.pipelines.conftest import CALL, PROMPT, Bed, close
from tests.pipelines.test_regions import ALL, LEFT, RIGHT, regional

CPU = torch.device("cpu")
TWO = (
    Region(("a",), box=LEFT, prompt="a red apple", words=("apple",)),
    Region(("b",), box=RIGHT, prompt="a cat", words=("cat",)),
)


def call_of(composer: Any, *regions: Region, steps: int = 4, images: int = 1, **options: Any) -> RegionalCall:
    """The parts of a call, as the pipeline makes them."""
    from adapters.progress import Silent
    from pipelines.diffusion.drawing import Request

    composer.compose("lora-composer", regions=list(regions), **options)
    plan = composer.plan(steps=steps)
    how = {"width": 32, "height": 32, "num_inference_steps": steps, "guidance_scale": 5.0, "output_type": "latent"}
    request = Request(PROMPT, "", images, True, 3, (32, 32), how, Silent(), 0)
    composer.pipe.scheduler.set_timesteps(steps)
    with torch.no_grad():
        return RegionalCall(
            composer.region_context(), plan, composer.composition.regions, composer.composition.options, request
        )


# Isolation


def test_regions_do_not_see_each_other() -> None:
    here = level([Place(LEFT, None), Place(RIGHT, None)], 4, 4, True, CPU)
    assert here.allowed is not None
    left = torch.tensor([cell % 4 < 2 for cell in range(16)])
    assert torch.equal(here.allowed, left[:, None] == left[None, :])


def test_one_region_needs_no_mask() -> None:
    assert level([Place(LEFT, None)], 4, 4, True, CPU).allowed is None


def test_overlapping_cells_see_both_regions() -> None:
    masks = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0]])
    allowed = level_of(masks, 1, 4, CPU).allowed
    assert allowed is not None
    assert allowed.tolist() == [[True, True, False, True], [True] * 4, [False, True, True, True], [True] * 4]


def test_values_of_another_region_have_no_influence(sd: Bed) -> None:
    call = call_of(sd.composer("a", "b"), *TWO, refine=False, reinit=False)
    states = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with call.attached() as run:
        run.prepare(torch.zeros(2, 4, 16, 16))
        name = "mid_block.attentions.0.transformer_blocks.0"
        attention = run.blocks[name].attn1
        inside = run.level(64).shares[1] > 0
        found = attention.processor(attention, states)
        (gradient,) = torch.autograd.grad(found[:, inside].square().sum(), states)
    assert float(gradient[:, ~inside].abs().max()) == 0
    assert float(gradient[:, inside].abs().max()) > 0


# Capture


def test_early_stop_changes_neither_loss_nor_gradient_and_runs_less(sd: Bed) -> None:
    call = call_of(sd.composer("a", "b"), *TWO, refine=True)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    found = []
    with call.attached():
        attending = call.attention
        assert attending is not None
        for stop in (True, False):
            attending.stop, ran = stop, []
            hooks = [
                module.register_forward_hook(lambda *_, ran=ran: ran.append(1))
                for module in call.run.unet.modules()  # type: ignore[union-attr]
            ]
            point = latents.clone().requires_grad_(True)
            with torch.enable_grad():
                value = attending.measure(point, 1)
                (gradient,) = torch.autograd.grad(value.sum(), point)
            for hook in hooks:
                hook.remove()
            found.append((value, gradient, len(ran)))
    assert torch.equal(found[0][0], found[1][0])
    close(found[0][1], found[1][1])
    assert found[0][2] < 0.7 * found[1][2]


def test_maps_are_softmaxes_over_all_tokens_and_all_cells(sd: Bed) -> None:
    call = call_of(sd.composer("a", "b"), *TWO, refine=True)
    with call.attached() as run, torch.no_grad():
        capture = Capture(run, call.attention.layers, [1, 2], with_self=True)
        text = {"encoder_hidden_states": call.encodings[0].positive["embeds"], "timestep": 500}
        maps(run, capture, torch.randn(1, 4, 16, 16), text)
    assert capture.cross_maps().shape == (1, 2, 64, 16)
    assert torch.allclose(capture.cross_maps().sum(-1), torch.ones(1, 2, 64), atol=1e-5)
    assert torch.allclose(capture.self_maps().sum(-1), torch.ones(1, 64), atol=1e-5)
    shares = run.hard and torch.tensor([cell % 8 < 4 for cell in range(64)])
    assert float(capture.self_maps()[0][shares][:, ~shares].abs().max()) == 0


def test_the_grid_to_read() -> None:
    unet = tiny.unet()
    assert set(factors(unet).values()) == {1, 2}
    assert capture_factor(unet, (16, 16), None) == 2
    assert capture_factor(unet, (8, 8), None) == 1
    with pytest.raises(InputError, match="where the latents are 1, 2 times smaller"):
        capture_factor(unet, (16, 16), 4)


# Refinement


def test_the_gradient_is_that_of_finite_differences_and_a_step_lowers_the_loss(sd: Bed) -> None:
    call = call_of(sd.composer("a", "b"), *TWO, refine=True)
    call.run.unet.double()  # type: ignore[union-attr]
    attending = call.attention
    assert attending is not None
    try:
        with call.attached():
            point = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
            attending.conditions = {key: value.double() for key, value in attending.conditions.items()}
            point.requires_grad_(True)
            with torch.enable_grad():
                value = attending.measure(point, 1).sum()
                (gradient,) = torch.autograd.grad(value, point)
            direction = gradient / gradient.norm()
            with torch.no_grad():
                reach = 2e-2
                up, down = (attending.measure(point + sign * reach * direction, 1) for sign in (1, -1))
            slope = float((up - down) / (2 * reach))
            assert slope == pytest.approx(float(gradient.norm()), rel=1e-2)
            assert float(down) < float(value)
    finally:
        call.run.unet.float()  # type: ignore[union-attr]


def test_loss_of_a_hand_made_map() -> None:
    options = RegionOptions(gaussian=False, fill_loss=False, region_loss=True)
    mask = torch.zeros(4, 4)
    mask[:, :2] = 1
    perfect = torch.zeros(1, 1, 16, 3)
    perfect[0, 0, :, 1] = 1.0  # attention 1 everywhere: nothing to enhance
    apart = torch.eye(16)[None]
    assert float(loss(perfect, apart, [[1]], [mask], options)) == pytest.approx(0, abs=1e-6)
    nothing = torch.zeros(1, 1, 16, 3)
    assert float(loss(nothing, apart, [[1]], [mask], options)) == pytest.approx(8)
    even = torch.full((1, 16, 16), 1 / 16)
    assert float(loss(nothing, even, [[1]], [mask], options)) == pytest.approx(8 + 10 / 16)
    filled = RegionOptions(gaussian=False, fill_loss=True, region_loss=False)
    # no attention: the region's 2 of 4 columns and all 4 rows are missed
    assert float(loss(nothing, None, [[1]], [mask], filled)) == pytest.approx(8 + 2 * (2 / 4) + 2 * 1)


def test_smoothing_keeps_the_mean_and_the_hill_is_highest_in_the_middle() -> None:
    flat = torch.full((2, 5, 6), 0.3)
    assert torch.allclose(smooth(flat), flat)
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[1:4, 2:5] = True
    hill = gaussian_hill(inside)
    assert float(hill[2, 3]) == 1
    assert float(hill[~inside].max()) == 0
    assert float(hill[1, 2]) == pytest.approx(torch.e**-1)


def test_the_trust_region_bounds_every_sample() -> None:
    latents, change = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    change[0] *= 1e-6
    short = limited(change, latents, 0.05)
    assert torch.equal(short[0], change[0])
    sizes = short.flatten(1).norm(dim=1) / latents.flatten(1).norm(dim=1)
    assert sizes[1:].tolist() == pytest.approx([0.05, 0.05], rel=1e-4)


def test_rates_and_the_end() -> None:
    refinement = Refinement(50, RegionOptions(), lambda latents, step: latents.sum((1, 2, 3)))
    assert refinement.rate(0) == 20
    assert refinement.rate(49) == pytest.approx(20 * 0.5**0.5)
    assert not refinement.over(24)
    assert refinement.over(25)


def test_a_growing_loss_ends_the_corrections_of_that_sample_only() -> None:
    def measure(latents: torch.Tensor, step: int) -> torch.Tensor:
        growing = torch.tensor([float(step), -float(step)])
        return growing + 0 * latents.sum((1, 2, 3)) + latents.flatten(1)[:, 0]

    refinement = Refinement(50, RegionOptions(trust_region=None), measure)
    latents = torch.zeros(2, 1, 2, 2)
    for step in range(7):
        before, latents = latents, refinement(latents, step)
    assert not torch.equal(latents[1], before[1])
    # its slope is 20 per step downwards, which beats the growth of 1: both go on
    flat = Refinement(50, RegionOptions(trust_region=None, refine_rate=1e-3), measure)
    latents = torch.zeros(2, 1, 2, 2)
    for step in range(7):
        before, latents = latents, flat(latents, step)
    assert torch.equal(latents[0], before[0])
    assert not torch.equal(latents[1], before[1])


def test_a_loss_that_is_no_number_ends_the_refinement_with_a_warning() -> None:
    refinement = Refinement(50, RegionOptions(), lambda z, step: z.sum((1, 2, 3)) * float("nan"))
    latents = torch.ones(1, 1, 2, 2)
    with pytest.warns(UserWarning, match="not finite"):
        assert torch.equal(refinement(latents, 0), latents)
    assert refinement.over(1)


# Re-initialisation


def test_the_best_window() -> None:
    attention = torch.zeros(6, 8)
    attention[3:5, 4:7] = 1
    assert best_window(attention, (2, 3)) == (3, 4)


def test_a_region_begins_with_its_best_window_and_the_statistics_stay() -> None:
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    attention = torch.zeros(2, 1, 8, 8)
    attention[0, 0, 4:, 4:] = 1
    attention[1, 0, :4, :4] = 1  # the second sample's best window is the region itself
    mask = torch.zeros(8, 8)
    mask[:4, :4] = 1
    made = rearranged(latents, attention, [mask], 2)
    axes = (1, 2, 3)
    assert torch.allclose(made.mean(axes), latents.mean(axes), atol=1e-5)
    assert torch.allclose(made.std(axes), latents.std(axes), atol=1e-5)
    inside, source = made[0, :, :8, :8].flatten(), latents[0, :, 8:, 8:].flatten()
    assert torch.corrcoef(torch.stack([inside, source]))[0, 1] == pytest.approx(1, abs=1e-5)
    assert torch.allclose(made[1], latents[1], atol=1e-5)


def test_nothing_changes_where_all_windows_are_the_regions_themselves() -> None:
    latents = torch.randn(1, 4, 16, 16)
    attention = torch.zeros(1, 1, 8, 8)
    attention[0, 0, 2:6, 0:4] = 1
    mask = attention[0, 0].clone()
    assert torch.equal(rearranged(latents, attention, [mask], 2), latents)


# A whole call


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("scope", ["cross", "spatial"])
def test_all_parts_together(beds: Any, family: str, scope: str) -> None:
    composer = beds(family).composer("a", "b")
    full = regional(composer, "lora-composer", *TWO, scope=scope, refine=True, seed=8)
    again = regional(composer, "lora-composer", *TWO, scope=scope, refine=True, seed=8)
    assert torch.equal(full, again)
    assert bool(torch.isfinite(full).all())
    for part in ("self_mask", "reinit", "refine"):
        without = regional(composer, "lora-composer", *TWO, scope=scope, seed=8, **{"refine": True, part: False})
        assert not torch.equal(without, full), part
    for term in ("gaussian", "fill_loss"):
        without = regional(composer, "lora-composer", *TWO, scope=scope, seed=8, **{"refine": True, term: False})
        assert not torch.equal(without, full), term
    # the two regions fill the picture, so isolation leaves nothing outside to look at
    open_ = {"scope": scope, "refine": True, "self_mask": False}
    looking = regional(composer, "lora-composer", *TWO, **open_)
    assert not torch.equal(looking, regional(composer, "lora-composer", *TWO, **open_, region_loss=False))


@pytest.mark.parametrize("scheduler", ["euler", "dpm++"])
def test_other_samplers_scale_once(sd: Bed, scheduler: str) -> None:
    """With rates of nothing the whole machinery must leave the picture as it is, also for samplers with a sigma."""
    composer = sd.composer("a", "b")
    plain = regional(composer, "cross", *TWO, self_mask=True, scheduler=scheduler)
    found = regional(composer, "lora-composer", *TWO, scheduler=scheduler, reinit=False, refine=True, refine_rate=1e-12)
    close(found, plain)


def test_refinement_is_for_models_of_its_size(sd: Bed) -> None:
    composer = sd.composer("a")
    composer.compose("lora-composer", regions=[Region(("a",), box=ALL)])
    assert composer.composition.options.refine is False


def test_the_model_is_as_before_also_after_a_stop(sd: Bed) -> None:
    composer = sd.composer("a", "b")
    unet = composer.pipe.unet
    before = [
        (type(m).__name__, getattr(m, "processor", None), len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in unet.modules()
    ]
    wanted = [p.requires_grad for p in unet.parameters()]

    class Stop:
        def report(self, progress: Any) -> None:
            pass

        def cancelled(self) -> bool:
            return True

    regional(composer, "lora-composer", *TWO, refine=True)
    with pytest.raises(Cancelled):
        composer(PROMPT, **CALL, monitor=Stop())
    after = [
        (type(m).__name__, getattr(m, "processor", None), len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in unet.modules()
    ]
    assert after == before
    assert [p.requires_grad for p in unet.parameters()] == wanted
    assert composer.joined().denoiser.gates.token_gates is None


def test_automatic_regions(sd: Bed) -> None:
    composer = sd.composer()
    composer.load_lora(sd.files["a"], "a", triggers=("apple",))
    composer.load_lora(sd.files["b"], "b", triggers=("cat",))
    composer.compose("activation", regions="auto")
    out = composer("an apple and a cat", **CALL)
    masks = [torch.frombuffer(bytearray(region.mask.tobytes()), dtype=torch.uint8) for region in out.regions]
    assert [region.name for region in out.regions] == ["a", "b"]
    assert all(
        region.mask.size == (32, 32) and int(mask.max()) == 255 for region, mask in zip(out.regions, masks, strict=True)
    )
    assert int(torch.minimum(*masks).max()) == 0  # no cell has two subjects
    places = [mask.view(32, 32).float() / 255 for mask in masks]
    drawn = (Region(("a",), mask=places[0]), Region(("b",), mask=places[1]))
    close(out.images, regional(composer, "activation", *drawn, prompt="an apple and a cat"))
    composer.compose("activation", regions="auto")
    with pytest.raises(InputError, match="which word"):
        composer("nothing of them", **CALL)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_automatic_regions_in_joint_transformers(beds: Any, family: str) -> None:
    composer = beds(family).composer()
    for name, word in (("a", "apple"), ("b", "cat")):
        composer.load_lora(beds(family).files[name], name, triggers=(word,), te_weight=0)
    prompt, guided = "an apple and a cat", {"true_cfg_scale": 3.0} if family == "flux" else {}
    for method in ("activation", "output"):
        composer.compose(method, regions="auto")
        out = composer(prompt, **CALL, **guided)
        drawn = [
            Region((region.name,), mask=torch.frombuffer(bytearray(region.mask.tobytes()), dtype=torch.uint8)
                   .view(32, 32).float() / 255)
            for region in out.regions
        ]  # fmt: skip
        assert [region.name for region in out.regions] == ["a", "b"]
        assert float(torch.minimum(*(region.mask for region in drawn)).max()) == 0
        composer.compose(method, regions=drawn)
        close(out.images, composer(prompt, **CALL, **guided).images)
    composer.compose("activation", regions="auto")
    with pytest.raises(InputError, match="which word"):
        composer("nothing of them", **CALL)


def test_attention_to_the_text_of_a_joint_transformer(beds: Any) -> None:
    """Against the softmax over the text's keys, read from the layers themselves with hooks."""
    composer = beds("sd3").composer()
    composer.load_lora(beds("sd3").files["a"], "a", triggers=("apple",), weight=0)  # the hooks below see the base alone
    composer.compose("activation", regions="auto", auto_steps=0.25)
    seen: dict[str, list[torch.Tensor]] = {}
    wanted: list[torch.Tensor] = []

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.setdefault(name, []).append(output[-1].clone())

    for number, block in enumerate(composer.pipe.transformer.transformer_blocks):
        block.attn.to_q.register_forward_hook(keep(f"q{number}"))
        block.attn.add_k_proj.register_forward_hook(keep(f"k{number}"))
    found: list[torch.Tensor] = []
    original = RegionalCall._reading

    def spy(self: RegionalCall, *args: Any) -> Any:
        run, maps_of, grid = original(self, *args)
        return run, lambda: found.append(maps_of()) or found[-1], grid

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RegionalCall, "_reading", spy)
        composer("an apple", **CALL)
    for number in (0, 1):
        query = seen[f"q{number}"][0].unflatten(1, (2, 8)).transpose(0, 1)
        key = seen[f"k{number}"][0].unflatten(1, (2, 8)).transpose(0, 1)
        wanted.append((query @ key.transpose(1, 2) / 8**0.5).softmax(-1).mean(0))
    close(found[0], torch.stack(wanted).mean(0))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_pictures_of_a_batch_are_those_made_alone(beds: Any, family: str) -> None:
    """Windows, losses and their end are each picture's own."""
    composer = beds(family).composer("a", "b")
    both = regional(composer, "lora-composer", *TWO, refine=True, images=2)
    close(both[1:], regional(composer, "lora-composer", *TWO, refine=True, seed=CALL["seed"] + 1), 1e-4)
    close(both[:1], regional(composer, "lora-composer", *TWO, refine=True), 1e-4)


def test_automatic_regions_are_each_pictures_own(sd: Bed) -> None:
    composer = sd.composer()
    composer.load_lora(sd.files["a"], "a", triggers=("apple",))
    composer.load_lora(sd.files["b"], "b", triggers=("cat",))
    composer.compose("activation", regions="auto")
    both = composer("an apple and a cat", **CALL, images=2)
    alone = composer("an apple and a cat", **(CALL | {"seed": CALL["seed"] + 1}))
    assert torch.equal(both.images[1:], alone.images)
    assert [region.name for region in both.regions] == ["a", "b", "a", "b"]
    assert both.regions[3].mask.tobytes() == alone.regions[1].mask.tobytes()


def test_attending_is_made_only_where_it_is_used(sd: Bed) -> None:
    call = call_of(sd.composer("a"), Region(("a",), box=ALL), reinit=False, refine=False)
    assert call.attention is None
    assert Attending.__doc__
