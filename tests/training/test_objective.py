"""The mathematics of the loss, against diffusers and against itself."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import InputError
from pipelines.diffusion.families.flux import unpack
from studio.datasets.seeds import derive, global_seed, normal, uniform
from studio.training.families import family_of
from studio.training.forward import draw
from studio.training.objective import Diffusion, FlowMatching, elementwise_loss, levels, per_sample, with_prior
from studio.training.supply import Batch
from tests import tiny
from tests.training.conftest import settings

SD_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def scheduler(**changes):
    return diffusers.DDPMScheduler(**SD_NOISE, **changes)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_diffusers(prediction):
    reference = scheduler(prediction_type=prediction)
    process = Diffusion(reference.config)
    clean, noise = torch.randn(2, 5, 4, 3, 3)
    times = torch.tensor([0, 1, 400, 998, 999])
    torch.testing.assert_close(process.noisy(clean, noise, times), reference.add_noise(clean, noise, times))
    wanted = noise if prediction == "epsilon" else reference.get_velocity(clean, noise, times)
    torch.testing.assert_close(process.target(clean, noise, times), wanted)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_is_diffusers(prediction):
    """The weights as in diffusers' training examples."""
    reference, times = scheduler(prediction_type=prediction), torch.arange(0, 1000, 37)
    snr = compute_snr(reference, times)
    wanted = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    wanted = wanted / snr if prediction == "epsilon" else wanted / (snr + 1)
    torch.testing.assert_close(Diffusion(reference.config).min_snr_weights(times, 5.0), wanted)


def test_min_snr_at_zero_terminal_snr():
    zero = {"rescale_betas_zero_snr": True}
    with pytest.raises(InputError, match="zero terminal SNR"):
        Diffusion(scheduler(prediction_type="epsilon", **zero).config).check_min_snr()
    velocity = Diffusion(scheduler(prediction_type="v_prediction", **zero).config)
    velocity.check_min_snr()
    assert torch.isfinite(velocity.min_snr_weights(torch.tensor([999]), 5.0)).all()


def test_flow_matching_is_a_straight_line():
    process = FlowMatching({"shift": 3.0})
    clean, noise = torch.randn(2, 3, 4, 2, 2)
    sigma = torch.tensor([0.25, 0.5, 1.0])
    step = 1e-3
    slope = (process.noisy(clean, noise, sigma) - process.noisy(clean, noise, sigma - step)) / step
    torch.testing.assert_close(slope, process.target(clean, noise, sigma), rtol=1e-2, atol=1e-3)
    assert process.default_shift == 3.0
    assert FlowMatching({"shift": 3.0, "use_dynamic_shifting": True}).default_shift == 1.0


@given(st.floats(0.001, 0.999), st.floats(0.1, 10.0), st.floats(0.0, 0.4), st.floats(0.5, 1.0))
def test_levels_stay_in_their_range(u, shift, low, high):
    for sampling in ("uniform", "logit-normal"):
        level = levels(torch.tensor([u]), sampling=sampling, mean=0.0, std=1.0, shift=shift, low=low, high=high)
        assert low - 1e-6 <= float(level) <= high + 1e-6


def test_logit_normal_levels_are_distributed_as_named():
    u = uniform(0, "test", range(4000))
    found = levels(u, sampling="logit-normal", mean=0.5, std=0.8, shift=1.0, low=0.0, high=1.0)
    logits = torch.logit(found)
    assert abs(float(logits.mean()) - 0.5) < 0.05
    assert abs(float(logits.std()) - 0.8) < 0.05


def test_losses():
    error = torch.tensor([[0.0, 0.01, 3.0]])
    zero = torch.zeros(1, 3)
    torch.testing.assert_close(elementwise_loss(error, zero, "l2", 0.1), error**2)
    torch.testing.assert_close(elementwise_loss(error, zero, "l1", 0.1), error.abs())
    huber = elementwise_loss(error, zero, "huber", 0.1)
    torch.testing.assert_close(huber[0, 1], torch.tensor(0.01**2), rtol=1e-2, atol=0)
    torch.testing.assert_close(huber[0, 2], torch.tensor(2 * 0.1 * (3 - 0.1)), rtol=1e-2, atol=0)


def test_prior_preservation_has_a_mean_for_each_half():
    losses = torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0, 40.0])
    assert float(with_prior(losses, 2, 0.5)) == 2.0 + 0.5 * 25.0
    assert float(with_prior(losses, 6, 0.5)) == float(losses.mean())
    assert per_sample(torch.ones(3, 4, 2, 2)).shape == (3,)


def test_a_sample_draws_the_same_numbers_in_any_batch():
    assert torch.equal(normal(3, "noise", [4, 5], (2, 2))[1], normal(3, "noise", [5], (2, 2))[0])
    assert derive(1, "noise", 0) != derive(1, "time", 0) != derive(2, "time", 0)


def test_options_do_not_move_each_other(tmp_path):
    batch = Batch(torch.zeros(3, 2, 4, 2, 2), {}, [7, 8, 8], shown=2)
    plain = draw(batch, settings(tmp_path, tmp_path), 0)
    rich = draw(batch, settings(tmp_path, tmp_path, input_perturbation=0.1), 0)
    assert torch.equal(plain.noise, rich.noise)
    assert torch.equal(plain.u, rich.u)
    assert not torch.equal(plain.noise[1], plain.noise[2])  # class pictures have streams of their own
    shifted = draw(batch, settings(tmp_path, tmp_path, noise_offset=0.5), 0).noise - plain.noise
    torch.testing.assert_close(shifted, shifted[:, :, :1, :1].expand_as(shifted))


def test_global_numbers_are_untouched_outside():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    with global_seed(0, "samples"):
        torch.rand(100)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_conditioning_is_the_pipelines(name):
    pipe = tiny.FAMILIES[name]()
    found = family_of(pipe).condition(["a cat", ""])
    wanted = pipe.encode_prompt(["a cat", ""], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    torch.testing.assert_close(found["embeds"], wanted[0])
    if name == "sdxl":
        torch.testing.assert_close(found["pooled"], wanted[2])


def test_latents_are_the_vaes():
    pipe = tiny.sd3()
    family = family_of(pipe)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    noise = torch.zeros(2, 4, 16, 16)
    with torch.no_grad():
        mean = pipe.vae.encode(pixels).latent_dist.mean
    wanted = (mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(family.latents(family.moments(pixels), noise), wanted)


def test_flux_packing_is_undone():
    latents = torch.randn(2, 4, 8, 6)
    packed = diffusers.FluxPipeline._pack_latents(latents, 2, 4, 8, 6)
    assert torch.equal(unpack(packed, 8, 6), latents)


@pytest.mark.parametrize("name", tiny.DRAWN_SMALL)
def test_the_prediction_in_training_is_the_pipelines(name):
    """What the pipeline gives its sampler first, without guidance by a second pass."""
    pipe = tiny.FAMILIES[name]()
    seen = []
    step = pipe.scheduler.step

    def watched(prediction, time, sample, *args, **kwargs):
        seen.append((prediction, time, sample))
        return step(prediction, time, sample, *args, **kwargs)

    pipe.scheduler.step = watched
    family = family_of(pipe)
    family.guidance = 3.5 if family.about.guidance_input else family.about.no_guidance
    size = {"width": 32, "height": 16, "num_inference_steps": 2, "output_type": "latent"}
    short = name in ("sd3", "flux", "chroma")  # training reads as much as the tokenizer says, here 16
    more = {"max_sequence_length": 16} if short else {}
    pipe(prompt="a cat", guidance_scale=family.guidance, **size, **more)
    prediction, time, sample = seen[0]
    if sample.ndim == 3:
        prediction, sample = (family.about.unpacked(pipe, tokens, 16, 32) for tokens in (prediction, sample))
    given = family.condition(["a cat"])
    if family.about.size_input:
        given["time_ids"] = torch.tensor([[16.0, 32, 0, 0, 16, 32]])
    times = time.view(1) / 1000 if family.about.flow else time.view(1)
    with torch.no_grad():
        found = family.predict(family.denoiser, sample, times, given)
    torch.testing.assert_close(found, prediction, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["flux2", "flux2-klein"])
def test_normalised_patches_of_latents(name):
    pipe = tiny.FAMILIES[name]()
    family = family_of(pipe)
    pixels = torch.rand(2, 3, 32, 16) * 2 - 1
    with torch.no_grad():
        found = family.latents(family.moments(pixels), torch.zeros(2, 4, 16, 8))
        torch.testing.assert_close(pipe._patchify_latents(found), pipe._encode_vae_image(pixels, None))
        torch.testing.assert_close(family.about.unscaled(pipe, found), family.moments(pixels)[:, 0])
        tokens = pipe._pack_latents(pipe._patchify_latents(found))
        torch.testing.assert_close(family.about.unpacked(pipe, tokens, 32, 16), found)
