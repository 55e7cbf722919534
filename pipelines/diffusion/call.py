"""The arguments of one call, and its result."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adapters.errors import InputError, nearest
from adapters.progress import Monitor, part
from pipelines.diffusion.drawing import joined
from pipelines.diffusion.prompt_syntax import Adapter, Lines, chosen, without_adapters
from pipelines.diffusion.regions.region import PlacedRegion, Region
from pipelines.diffusion.report import Plan
from pipelines.diffusion.varied import Strengths
from pipelines.videos import Sound


@dataclass(frozen=True)
class Call:
    """The arguments of a call, see :meth:`pipelines.diffusion.pipeline.MultiLoRAPipeline.__call__`."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance_scale: float | None
    seed: int
    images: int
    width: int | None
    height: int | None
    scheduler: str
    monitor: Monitor
    preview_every: int
    true_cfg_scale: float
    output_type: str
    allow_double_guidance: bool
    generators: Any = None
    callback: Any = None
    callback_tensors: tuple[str, ...] = ()
    strengths: tuple[Strengths, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    frames: int | None = None
    prompts: tuple[str, ...] = ()

    def each(self) -> list[Call]:
        """One call for each picture."""
        generators = self.generators if isinstance(self.generators, list) else [self.generators] * self.images
        latents = self.more.get("latents")
        return [
            replace(
                self, images=1, seed=self.seed + k, monitor=part(self.monitor, k, self.images),
                generators=generators[k], strengths=self.strengths[k : k + 1], prompts=(),
                prompt=self.prompts[k] if self.prompts else self.prompt,
                more=self.more if latents is None else {**self.more, "latents": latents[k : k + 1]},
            )
            for k in range(self.images)
        ]  # fmt: skip

    def decided(self, lines: Lines) -> Call:
        """The call with every choice in its texts made by the seed."""
        prompt, negative = (chosen(text, self.seed, lines) for text in (self.prompt, self.negative_prompt))
        return replace(self, prompt=prompt, negative_prompt=negative)


@dataclass(frozen=True)
class Output:
    """Result of a call.

    Attributes:
        images: list of PIL images (for videos: a list of frames each), or the latents with ``output_type="latent"``.
        plan: what was done.
        flagged: per picture, whether a safety checker flagged it; empty without one.
        regions: where the regions were; automatic ones for each picture in turn.
        sound: of each video, if the model makes it.
    """

    images: Any
    plan: Plan
    flagged: tuple[bool, ...] = ()
    regions: tuple[PlacedRegion, ...] = ()
    sound: tuple[Sound, ...] = ()


ALIASES = {
    "num_inference_steps": "steps",
    "num_images_per_prompt": "images",
    "num_videos_per_prompt": "images",
    "num_frames": "frames",
}
"""diffusers' names of our arguments."""

REFUSED = {
    "cross_attention_kwargs": "its scale would apply to all adapters alike; set weight, schedule or region of each",
    "joint_attention_kwargs": "its scale would apply to all adapters alike; set weight, schedule or region of each",
    "prompt_embeds": "adapters with text encoder layers need the text; use prompt",
    "negative_prompt_embeds": "adapters with text encoder layers need the text; use negative_prompt",
    "pooled_prompt_embeds": "adapters with text encoder layers need the text; use prompt",
    "negative_pooled_prompt_embeds": "adapters with text encoder layers need the text; use negative_prompt",
    "clip_skip": "prompts are encoded as the base model was trained",
    "return_dict": "the result is an Output, with the pictures in images",
    "max_sequence_length": "the length follows from the prompt",
    "callback": "use callback_on_step_end, or monitor",
    "callback_steps": "use callback_on_step_end, or monitor",
}
"""diffusers' arguments that are refused here, and why."""


def diffusers_arguments(pipe: Any, given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by our names, with diffusers' names translated; "more" holds those passed on to the wrapped pipeline.

    Args:
        pipe: the diffusers pipeline.
        given: arguments that are not ours.
        ours: arguments by our names; None = left out.

    Raises:
        InputError: an argument that is refused, unknown to this pipeline, or given by both names; or not one generator
            or latent per picture.
    """
    found = {name: value for name, value in ours.items() if value is not None}
    more: dict[str, Any] = {}
    known = inspect.signature(type(pipe).__call__).parameters
    for name, value in given.items():
        if value is None:
            continue
        if name in ALIASES:
            if found.get(ALIASES[name], value) != value:
                raise InputError(f"{name} and {ALIASES[name]} mean the same and differ: leave one out.")
            found[ALIASES[name]] = value
        elif name in REFUSED or name.startswith(("prompt_", "negative_prompt_")):
            reason = REFUSED.get(name, "one prompt goes to all text encoders")
            raise InputError(f"{name} cannot be used here: {reason}.")
        elif name in ("generator", "callback_on_step_end", "callback_on_step_end_tensor_inputs"):
            found[name] = value
        elif name not in known:
            possible = [*known, *ours, *ALIASES]
            raise InputError(f"A {type(pipe).__name__} has no argument {name}{nearest(name, possible)}.")
        else:
            more[name] = value
    images = found.get("images", 1)
    generator = found.get("generator")
    if isinstance(generator, list | tuple):
        found["generator"] = list(generator)
        if len(generator) != images:
            raise InputError(f"{len(generator)} generators are given for {images} picture(s): give one for each.")
    latents = more.get("latents")
    if latents is not None and len(latents) != images:
        raise InputError(f"{len(latents)} latents are given for {images} picture(s): give one for each.")
    return {**found, "more": more}


def together(outputs: Sequence[Output]) -> Output:
    """The results of calls for one picture each as one result, with the plan of the first."""
    return Output(
        joined([output.images for output in outputs]),
        outputs[0].plan,
        tuple(flag for output in outputs for flag in output.flagged),
        tuple(region for output in outputs for region in output.regions),
        tuple(one for output in outputs for one in output.sound),
    )


def decided(regions: Sequence[Region], seed: int, lines: Lines) -> tuple[Region, ...]:
    """The regions with every choice in their texts made by ``seed``."""
    return tuple(
        replace(
            region,
            prompt=chosen(region.prompt, seed, lines),
            negative=None if region.negative is None else chosen(region.negative, seed, lines),
        )
        for region in regions
    )


def check_named(adapters: Sequence[Adapter], others: Sequence[str], present: Sequence[str]) -> None:
    """Refuse adapters named in a prompt that cannot be used.

    Args:
        adapters: those named in the main prompt.
        others: texts that may not name any (the negative prompt, those of regions).
        present: names of the composition's adapters.

    Raises:
        InputError: an adapter is not part of the composition, or is named in another text.
    """
    for adapter in adapters:
        if adapter.name not in present:
            known = ", ".join(present) or "none"
            raise InputError(
                f"The prompt names the adapter '{adapter.name}'{nearest(adapter.name, present)}, which is not part of "
                f"this composition (which has {known}): load it with load_lora, or remove it from the prompt."
            )
    for text in others:
        if found := without_adapters(text)[1]:
            raise InputError(
                f"<lora:{found[0].name}:...> works in the main prompt only: move it there, or give the adapter to a "
                "region."
            )
