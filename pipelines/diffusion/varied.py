"""Pictures of one batch that differ in the strengths of their adapters.

    (z_1, c_1) ... (z_n, c_n)      n pictures (in each guidance half), where adapter i has strength g_ki in picture k

Each picture has its own text, because adapters also act in the text encoders, and its own row of gates
(:meth:`adapters.layers.gated.Gates.per_sample`). Nothing is folded into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from adapters.errors import InputError
from adapters.layers.gated import Gates
from pipelines.diffusion import methods
from pipelines.diffusion.checks import check_prompt
from pipelines.diffusion.denoise import Arguments, Denoising, as_batch
from pipelines.diffusion.families import Encoding, Family
from pipelines.diffusion.methods.step import Step
from pipelines.diffusion.prompt_syntax import without_adapters
from pipelines.diffusion.rack import Loaded

Strengths = Mapping[str, tuple[float, float]]
"""Adapter's name -> its strength in the denoiser and in the text encoders."""


@dataclass(frozen=True)
class Variant:
    """A picture of the batch: its steps, and its text for all of them."""

    steps: tuple[Step, ...]
    encoding: Encoding


class Varied(Denoising):
    """The hooks of a run in which every picture has its own gates."""

    def __init__(self, family: Family, gates: Gates, variants: Sequence[Variant]) -> None:
        steps = variants[0].steps
        super().__init__(family, gates, steps, [[()]] * len(steps), {(): encodings(variants)}, ())
        self._rows = [torch.tensor([one.steps[k].gates for one in variants]) for k in range(len(steps))]

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        self.calls += 1
        rows = self._rows[min(self.step, len(self._rows) - 1)]
        self.gates.per_sample(rows.repeat(self._batch(args, kwargs) // len(rows), 1))
        return args, kwargs


def encodings(variants: Sequence[Variant]) -> Encoding:
    """The texts of all pictures as those of one batch."""
    first = variants[0].encoding
    positive = _joined([one.encoding.positive for one in variants])
    guided = first.negative is not None
    return replace(
        first,
        positive=positive,
        negative=_joined([one.encoding.negative or {} for one in variants]) if guided else None,
    )


def _joined(texts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: as_batch([one[name] for one in texts]) for name in texts[0]}


def check_prompts(prompts: Sequence[str], images: int, varied: bool) -> None:
    """Refuse prompts per picture that are not one for each, or come without strengths per picture.

    Raises:
        InputError: so, or a prompt sets strengths itself.
    """
    if len(prompts) != images or not varied:
        raise InputError(f"{len(prompts)} prompts are given for {images} pictures: give one, and strengths, for each.")
    for prompt in prompts:
        check_prompt(prompt, "The prompt")
        if without_adapters(prompt)[1]:
            raise InputError("A prompt of several names an adapter itself (<lora:...>): give its strength beside it.")


def check_varied(
    strengths: Sequence[Strengths], images: int, method: str, ordinary: bool, loaded: Mapping[str, Loaded]
) -> None:
    """Refuse strengths per picture where pictures cannot share a batch.

    Args:
        ordinary: the wrapped pipeline is the family's text-to-image pipeline.
        loaded: the adapters of the composition.

    Raises:
        InputError: their number differs from that of the pictures; the method, the pipeline or an adapter (DoRA,
            distilled) has one setting for the whole batch; or an adapter is not part of the composition.
    """
    if len(strengths) != images:
        raise InputError(
            f"Strengths for {len(strengths)} pictures are given, but {images} are made: give one for each."
        )
    if not methods.properties(method).constant:
        able = ", ".join(methods.names(lambda known: known.constant))
        raise InputError(
            f"'{method}' cannot give each picture its own strengths: use {able}, or make one picture at a time."
        )
    if not ordinary:
        raise InputError("Only text to image can give each picture its own strengths: make one picture at a time.")
    for name in dict.fromkeys(name for one in strengths for name in one):
        if name not in loaded:
            raise InputError(
                f"'{name}' is not part of the composition, which has {', '.join(loaded) or 'no adapters'}."
            )
        if loaded[name].report.dora or loaded[name].distilled is not None:
            kind = "a DoRA adapter" if loaded[name].report.dora else "a distilled adapter"
            raise InputError(
                f"'{name}' is {kind}, whose strength is the same for all pictures of a batch: make one at a time."
            )
