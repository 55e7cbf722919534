"""What a base's configuration says is honoured or refused, by composing and training alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from adapters.errors import InputError
from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.loading import open_pipeline
from pipelines.diffusion.preview import preview
from studio.training.families import family_of
from tests import tiny


def with_scheduler(kind: str, **values: Any) -> Any:
    pipe = tiny.sdxl()
    pipe.scheduler = getattr(diffusers, kind)(**values)
    return pipe


def test_a_denoiser_with_more_channels_is_refused_by_every_door(tmp_path: Any) -> None:
    tiny.sd(in_channels=9).save_pretrained(tmp_path)
    for door in (MultiLoRAPipeline.from_pretrained, open_pipeline):
        with pytest.raises(InputError, match=r"reads 9 channels, Stable Diffusion 1\.x / 2\.x has 4"):
            door(tmp_path)
    with pytest.raises(InputError, match="reads 9 channels"):
        MultiLoRAPipeline(tiny.sd(in_channels=9))
    with pytest.raises(InputError, match="reads 9 channels"):
        family_of(tiny.sd(in_channels=9))


def test_a_denoiser_with_classes_is_refused() -> None:
    with pytest.raises(InputError, match="num_class_embeds '3'"):
        MultiLoRAPipeline(tiny.sd(num_class_embeds=3))


@torch.no_grad()
def test_statistics_of_latents_are_honoured() -> None:
    mean, std = [-1.6, 1.1, 0.5, 2.0], [8.4, 5.9, 6.9, 5.1]
    pipe = tiny.sdxl()
    pipe.vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    raw = torch.randn(1, 4, 16, 16) * 5
    found = family_of(pipe).latents(torch.stack([raw, torch.zeros_like(raw)], 1), torch.zeros_like(raw))
    wanted = (raw - torch.tensor(mean).view(1, 4, 1, 1)) * 0.5 / torch.tensor(std).view(1, 4, 1, 1)
    torch.testing.assert_close(found, wanted)
    seen: list[torch.Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda latents, **more: (seen.append(latents), decode(latents, **more))[1]
    preview(pipe, found, 32, 32)
    torch.testing.assert_close(seen[0], raw)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [("sd", "latents_mean", [1.0] * 4), ("sd3", "latents_std", [1.0] * 4), ("sdxl", "shift_factor", 0.1)],
)
def test_statistics_that_the_pipeline_passes_over_are_refused(family: str, field: str, value: Any) -> None:
    pipe = tiny.FAMILIES[family]()
    pipe.vae.register_to_config(**{field: value})
    doors: tuple[Callable[[Any], Any], ...] = (MultiLoRAPipeline, family_of)
    for door in doors:
        with pytest.raises(InputError, match=f"VAE of this base has {field}"):
            door(pipe)


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_composes_as_it_is_and_is_not_trained(kind: str) -> None:
    pipe = with_scheduler(kind, sigma_data=0.5)
    wanted = pipe("a cat", num_inference_steps=2, width=32, height=32, output_type="latent",
                  generator=[torch.Generator().manual_seed(0)]).images  # fmt: skip
    composer = MultiLoRAPipeline(with_scheduler(kind, sigma_data=0.5))
    call: dict[str, Any] = {"steps": 2, "width": 32, "height": 32, "output_type": "latent"}
    torch.testing.assert_close(composer("a cat", **call).images, wanted)
    with pytest.raises(InputError, match="EDM's noise, which the sampler 'euler' does not support"):
        composer("a cat", **call, scheduler="euler")
    with pytest.raises(InputError, match=r"EDM's noise and scaling .* do not support"):
        family_of(pipe)


def test_zero_terminal_snr_is_honoured_and_odd_predictions_are_refused() -> None:
    pipe = with_scheduler("DDIMScheduler", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    process: Any = family_of(pipe).process
    assert process.prediction == "v_prediction"
    assert float(process.alphas_cumprod[-1]) < 1e-6
    pipe.scheduler.register_to_config(prediction_type="flow_prediction")
    for door in (MultiLoRAPipeline, family_of):
        with pytest.raises(InputError, match="predicts 'flow_prediction'"):
            door(pipe)


def test_an_unknown_field_is_named() -> None:
    pipe = tiny.sd()
    pipe.scheduler.register_to_config(new_noise=0.3)
    with pytest.raises(InputError, match=r"has new_noise=0\.3, which training does not support"):
        family_of(pipe)
    pipe = tiny.sd3()
    pipe.vae.register_to_config(latent_magnitude=2.0)
    with pytest.raises(InputError, match=r"latent_magnitude=2\.0"):
        family_of(pipe)


@pytest.mark.parametrize("family", tiny.TRAINABLE)
def test_ordinary_bases_pass(family: str) -> None:
    assert family_of(tiny.FAMILIES[family]()).name == family
