"""Samplers by name, made from the configuration of the base model's own scheduler."""

from __future__ import annotations

import copy
from typing import Any

from adapters.errors import InputError
from pipelines.diffusion.families.configuration import is_edm

NOISE = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
FLOW = {"euler": "FlowMatchEulerDiscreteScheduler", "lcm": "FlowMatchLCMScheduler"}


def sampler(name: str, own: Any, flow: bool) -> Any:
    """A fresh scheduler called ``name`` for a model whose own scheduler is ``own``.

    Raises:
        InputError: unknown name, or a sampler the family has none of.
    """
    import diffusers

    if name == "default":
        return type(own).from_config(own.config)
    known = FLOW if flow else NOISE
    if name not in known:
        kind = "flow-matching models" if flow else "this model"
        raise InputError(f"The sampler '{name}' is not possible for {kind}: choose default, {', '.join(known)}.")
    if is_edm(own):
        raise InputError(f"This base has EDM's noise, which the sampler '{name}' does not have: choose default.")
    kind_of_scheduler = getattr(diffusers, known[name])
    return kind_of_scheduler.from_config(own.config)


def count_steps(scheduler: Any, steps: int, flow: bool) -> int:
    """How often the denoiser is asked in ``steps`` steps (some schedulers, like PNDM, ask more often)."""
    if flow:
        return steps
    probe = copy.deepcopy(scheduler)
    probe.set_timesteps(steps)
    return len(probe.timesteps)
