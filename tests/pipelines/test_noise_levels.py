"""Schedules by the sampler's noise level."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapters.errors import InputError
from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.regions import Region
from pipelines.diffusion.samplers import FLOW, NOISE, check_noise, noise_levels
from tests import tiny
from tests.pipelines.conftest import Bed, close, latents


class Watched:
    """Notes the noise level of every denoiser call that the pipeline really makes."""

    def __init__(self, composer: MultiLoRAPipeline) -> None:
        self.pipe = composer.pipe
        self.seen: list[float] = []
        composer.rack.denoiser.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: Any, kwargs: Any) -> None:
        scheduler = self.pipe.scheduler
        if hasattr(scheduler, "sigmas"):
            self.seen.append(float(scheduler.sigmas[scheduler.step_index or 0]))
        else:
            time = args[1] if len(args) > 1 else kwargs.get("timestep", kwargs.get("t"))
            alpha = scheduler.alphas_cumprod[int(torch.as_tensor(time).flatten()[0])]
            self.seen.append(float(((1 - alpha) / alpha) ** 0.5))


def by_sigma(bed: Bed, low: float, high: float) -> MultiLoRAPipeline:
    """A composition whose adapter acts at noise levels from ``low`` to just below ``high``."""
    composer = MultiLoRAPipeline(bed.pipe())
    keyframes = [(low, 0.0), (low, 1.0), (high, 1.0), (high, 0.0)]
    composer.load_lora(bed.files["a"], "a", schedule=keyframes, schedule_by="sigma")
    return composer


@pytest.mark.parametrize("family", tiny.PICTURES)
def test_an_adapter_acts_at_the_noise_levels_of_its_schedule(beds: Any, family: str) -> None:
    bed: Bed = beds(family)
    whole = MultiLoRAPipeline(bed.pipe())
    levels = noise_levels(whole.pipe, whole.family, 5, {}, (32, 32))
    middle = (levels[2] + levels[3]) / 2
    composer = by_sigma(bed, middle, 100.0)
    found = latents(composer, "merge", steps=5)
    plan = composer.plan(steps=5)
    acting = [k for k, step in enumerate(plan.steps) if step.gates[0]]
    assert acting == [0, 1, 2]  # noise falls over the steps
    other = MultiLoRAPipeline(bed.pipe())
    end = len(acting) / 5
    other.load_lora(bed.files["a"], "a", schedule=[(0, 1), (end, 1), (end, 0), (1, 0)])
    close(found, latents(other, "merge", steps=5))


@pytest.mark.parametrize(("family", "sampler"), [
    *(("sd", name) for name in NOISE), *(("flux", name) for name in FLOW), *(("sd3", name) for name in FLOW),
])  # fmt: skip
@pytest.mark.parametrize("steps", [4, 7])
def test_planned_noise_levels_are_those_of_the_run(beds: Any, family: str, sampler: str, steps: int) -> None:
    composer = by_sigma(beds(family), 0.5, 0.9)
    watched = Watched(composer)
    latents(composer, "merge", steps=steps, scheduler=sampler)  # raises where the plan was wrong
    levels = composer.plan(steps=steps, scheduler=sampler).steps
    guided = len(watched.seen) // steps
    real = watched.seen[::guided][:steps] if guided > 1 else watched.seen
    assert [bool(step.gates[0]) for step in levels] == [0.5 <= level < 0.9 for level in real]


def test_regions_have_noise_levels_too(sd: Bed) -> None:
    composer = sd.composer("a")
    place = {"box": (0, 0, 0.5, 1)}
    composer.compose("activation", regions=[
        Region(("a",), schedule=((3.0, 0.0), (3.0, 1.0)), schedule_by="sigma", **place)
    ])  # fmt: skip
    plan = composer.plan(steps=4)
    strengths = [step.rows[1][0] for step in plan.steps]
    assert (strengths[0], strengths[-1]) == (1, 0)


def test_a_run_with_other_noise_levels_is_stopped() -> None:
    pipe = tiny.sd()
    pipe.scheduler.set_timesteps(4)
    with pytest.raises(InputError, match="schedules by step"):
        check_noise(pipe.scheduler, [9.0, 8.0, 7.0, 6.0])


@pytest.mark.parametrize(("keyframes", "by", "sentence"), [
    ([(-0.1, 1.0)], "sigma", "negative noise level"),
    ([(0.0, 1.0)], "time", "use step or sigma"),
    ([(2.0, 1.0)], "step", "outside"),
])  # fmt: skip
def test_bad_schedules(sd: Bed, keyframes: Any, by: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        MultiLoRAPipeline(sd.pipe()).load_lora(sd.files["a"], "a", schedule=keyframes, schedule_by=by)
