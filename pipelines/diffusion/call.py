"""What a person asks of one call, and what comes back."""

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
    more: Mapping[str, Any] = field(default_factory=dict)

    def each(self) -> list[Call]:
        """One call for each picture."""
        generators = self.generators if isinstance(self.generators, list) else [self.generators] * self.images
        latents = self.more.get("latents")
        return [
            replace(
                self, images=1, seed=self.seed + k, monitor=part(self.monitor, k, self.images),
                generators=generators[k],
                more=self.more if latents is None else {**self.more, "latents": latents[k : k + 1]},
            )
            for k in range(self.images)
        ]  # fmt: skip

    def decided(self, lines: Lines) -> Call:
        """With every choice in the texts made by the seed."""
        prompt, negative = (chosen(text, self.seed, lines) for text in (self.prompt, self.negative_prompt))
        return replace(self, prompt=prompt, negative_prompt=negative)


@dataclass(frozen=True)
class Output:
    """The pictures of a call (PIL images, or latents if asked), the plan they followed and where its regions were
    (automatic ones: of each picture, one after the other)."""

    images: Any
    plan: Plan
    flagged: tuple[bool, ...] = ()
    regions: tuple[PlacedRegion, ...] = ()


ALIASES = {"num_inference_steps": "steps", "num_images_per_prompt": "images"}
"""diffusers' names of our arguments."""

REFUSED = {
    "cross_attention_kwargs": "a scale there would act on all adapters alike; set weight, schedule or region of each",
    "joint_attention_kwargs": "a scale there would act on all adapters alike; set weight, schedule or region of each",
    "prompt_embeds": "adapters with text encoder layers need the words; give prompt",
    "negative_prompt_embeds": "adapters with text encoder layers need the words; give negative_prompt",
    "pooled_prompt_embeds": "adapters with text encoder layers need the words; give prompt",
    "negative_pooled_prompt_embeds": "adapters with text encoder layers need the words; give negative_prompt",
    "clip_skip": "prompts are encoded as the base model was trained",
    "return_dict": "an Output comes back, whose images are the pictures",
    "max_sequence_length": "the length follows the prompt",
    "callback": "give callback_on_step_end, or monitor",
    "callback_steps": "give callback_on_step_end, or monitor",
}
"""diffusers' arguments that cannot be used here, and why."""


def diffusers_arguments(pipe: Any, given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Our arguments with diffusers' names for them replaced, and under "more" what the wrapped pipeline takes itself.

    Args:
        given: arguments that are not ours.
        ours: arguments by our names, None where left out.

    Raises:
        InputError: an argument that is refused, unknown to this pipeline, or given by both names.
    """
    said = {name: value for name, value in ours.items() if value is not None}
    more: dict[str, Any] = {}
    known = inspect.signature(type(pipe).__call__).parameters
    for name, value in given.items():
        if value is None:
            continue
        if name in ALIASES:
            if said.get(ALIASES[name], value) != value:
                raise InputError(f"{name} and {ALIASES[name]} are the same, and both are given: leave one out.")
            said[ALIASES[name]] = value
        elif name in REFUSED or name.startswith(("prompt_", "negative_prompt_")):
            reason = REFUSED.get(name, "one prompt goes to all text encoders")
            raise InputError(f"{name} is not taken here: {reason}.")
        elif name in ("generator", "callback_on_step_end", "callback_on_step_end_tensor_inputs"):
            said[name] = value
        elif name not in known:
            possible = [*known, *ours, *ALIASES]
            raise InputError(f"A {type(pipe).__name__} takes no {name}{nearest(name, possible)}.")
        else:
            more[name] = value
    images = said.get("images", 1)
    generator = said.get("generator")
    if isinstance(generator, list | tuple):
        said["generator"] = list(generator)
        if len(generator) != images:
            raise InputError(f"{len(generator)} generators are given for {images} picture(s): give one for each.")
    latents = more.get("latents")
    if latents is not None and len(latents) != images:
        raise InputError(f"{len(latents)} latents are given for {images} picture(s): give one for each.")
    return {**said, "more": more}


def together(outputs: Sequence[Output]) -> Output:
    """Calls for one picture each, as if they were one (with the plan of the first)."""
    return Output(
        joined([output.images for output in outputs]),
        outputs[0].plan,
        tuple(flag for output in outputs for flag in output.flagged),
        tuple(region for output in outputs for region in output.regions),
    )


def decided(regions: Sequence[Region], seed: int, lines: Lines) -> tuple[Region, ...]:
    """The regions with every choice in their texts made by the seed."""
    return tuple(
        replace(
            region,
            prompt=chosen(region.prompt, seed, lines),
            negative=None if region.negative is None else chosen(region.negative, seed, lines),
        )
        for region in regions
    )


def check_named(adapters: Sequence[Adapter], others: Sequence[str], present: Sequence[str]) -> None:
    """Refuse adapters that a prompt names and that cannot act.

    Args:
        others: texts that may name none (the negative prompt, those of regions).
        present: names of the composition's adapters.

    Raises:
        InputError: naming the adapter.
    """
    for adapter in adapters:
        if adapter.name not in present:
            known = ", ".join(present) or "none"
            raise InputError(
                f"The prompt names the adapter '{adapter.name}'{nearest(adapter.name, present)}, which is not part of "
                f"this composition (there: {known}): load it with load_lora, or take it out of the prompt."
            )
    for text in others:
        if found := without_adapters(text)[1]:
            raise InputError(
                f"<lora:{found[0].name}:...> acts in the main prompt only: move it there, or give the adapter to a "
                "region."
            )
