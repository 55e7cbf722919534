"""Samplers by name, created from the configuration of the base model's own scheduler."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError
from pipelines.diffusion.families.configuration import is_edm

if TYPE_CHECKING:
    from pipelines.diffusion.families import Family

NOISE = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
NOISE_ERROR = 1e-3
"""Largest relative difference between planned and real noise levels."""

FLOW = {"euler": "FlowMatchEulerDiscreteScheduler", "lcm": "FlowMatchLCMScheduler"}


def sampler(name: str, own: Any, flow: bool) -> Any:
    """A fresh scheduler called ``name`` for a model whose own scheduler is ``own``.

    Raises:
        InputError: an unknown name, or a sampler that does not work with this model.
    """
    import diffusers

    if name == "default":
        return type(own).from_config(own.config)
    known = FLOW if flow else NOISE
    if name not in known:
        kind = "flow-matching models" if flow else "this model"
        raise InputError(f"The sampler '{name}' is not possible for {kind}: choose default, {', '.join(known)}.")
    if is_edm(own):
        raise InputError(f"This base has EDM's noise, which the sampler '{name}' does not support: choose default.")
    kind_of_scheduler = getattr(diffusers, known[name])
    shift = own.config.get("flow_shift")  # UniPC's word for it
    return kind_of_scheduler.from_config(own.config, **({"shift": shift} if flow and shift is not None else {}))


def count_part(pipe: Any, steps: int, more: Mapping[str, Any], flow: bool) -> int:
    """Number of denoiser calls in a call of ``pipe``, whose arguments ``more`` may skip steps (``strength``,
    ``denoising_start``, ``denoising_end``) or list them (``timesteps``, ``sigmas``)."""
    own = pipe.scheduler
    listed = next((more[name] for name in ("timesteps", "sigmas") if more.get(name) is not None), None)
    whole = count_steps(own, steps, flow) if listed is None else len(listed)
    parameters = inspect.signature(type(pipe).__call__).parameters
    probe = copy.deepcopy(own)
    if "strength" in parameters and hasattr(pipe, "get_timesteps"):
        strength = more.get("strength", parameters["strength"].default)
        probe.set_timesteps(steps, **({"mu": 1.0} if flow and own.config.get("use_dynamic_shifting") else {}))
        start = {"denoising_start": more["denoising_start"]} if more.get("denoising_start") is not None else {}
        try:
            pipe.scheduler = probe
            times, _ = pipe.get_timesteps(steps if listed is None else whole, strength, "cpu", **start)
        finally:
            pipe.scheduler = own
        whole = len(times)
    else:
        if flow:
            return whole
        probe.set_timesteps(steps)
        times = probe.timesteps
    end = more.get("denoising_end")
    if end is None:
        return whole
    last = round(own.config.num_train_timesteps * (1 - end))
    return sum(1 for time in times if time >= last)


def noise_levels(pipe: Any, family: Family, steps: int, more: Mapping[str, Any], size: tuple[int, int]) -> list[float]:
    """The noise level before each denoiser call of a whole run, see :mod:`pipelines.diffusion.schedule`.

    Args:
        more: arguments of the call, which may list ``timesteps`` or ``sigmas``.
        size: height and width of the picture in pixels.
    """
    probe = copy.deepcopy(pipe.scheduler)
    listed = {name: more[name] for name in ("timesteps", "sigmas") if more.get(name) is not None}
    usual = family.timetable(pipe, steps, size)
    if listed:
        usual = {name: value for name, value in usual.items() if name not in ("num_inference_steps", "sigmas")} | listed
    probe.set_timesteps(**usual)
    return levels_of(probe)


def levels_of(scheduler: Any) -> list[float]:
    """The noise level before each denoiser call of a scheduler whose timesteps are set."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        return [float(sigma) for sigma in sigmas[: len(scheduler.timesteps)]]
    alphas = scheduler.alphas_cumprod[scheduler.timesteps.long().cpu()]
    return [float(level) for level in ((1 - alphas) / alphas) ** 0.5]


def check_noise(scheduler: Any, planned: Sequence[float]) -> None:
    """Compare the noise levels that a plan was made with to those of the running scheduler.

    Raises:
        InputError: they differ, so a schedule by sigma would act at other steps.
    """
    real = levels_of(scheduler)[-len(planned) :]
    pairs = zip(real, planned, strict=False)
    if len(real) < len(planned) or any(abs(a - b) > NOISE_ERROR * max(1.0, a) for a, b in pairs):
        raise InputError("The noise levels of this pipeline cannot be known beforehand: use schedules by step.")


def count_steps(scheduler: Any, steps: int, flow: bool) -> int:
    """Number of denoiser calls in ``steps`` steps (more than ``steps`` with some schedulers, such as PNDM)."""
    if flow:
        return steps
    probe = copy.deepcopy(scheduler)
    probe.set_timesteps(steps)
    return len(probe.timesteps)
