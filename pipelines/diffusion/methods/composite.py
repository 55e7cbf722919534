"""Composite: every adapter predicts on its own, and the guided predictions are averaged in every step.

"Multi-LoRA Composition for Image Generation" (arXiv 2402.16843), LoRA Composite:

    eps = 1/N sum_i [ eps_i(z, null) + w (eps_i(z, c) - eps_i(z, null)) ]

eps_i is the denoiser with adapter i alone (in the unconditional half too), w the guidance scale. Guidance is linear,
so averaging both halves before it gives the same. All N predictions are one batch (adapter-major) and one scheduler
step. Adapters whose strength is 0 in a step are left out of its mean, so a weight of 0 removes an adapter, and N = 1 is
plain LoRA at any weight.
"""

from __future__ import annotations

from torch import Tensor

from adapters.catalogue import Method
from pipelines.diffusion.methods.step import Step, Strengths

METHOD = Method(
    name="composite",
    title="LoRA Composite",
    summary="Each adapter predicts alone and the predictions are averaged in every step: slower, preserves concepts.",
    stage="compose",
    makes="picture",
    paper="Multi-LoRA Composition for Image Generation, arXiv 2402.16843",
    entry="pipelines.diffusion.methods.composite:steps",
    properties={"position": 2},
)


def steps(strengths: Strengths) -> list[Step]:
    """Separate predictions per step, one per adapter in use."""
    return [Step(row, separate=True) for row in strengths]


def reduce(predictions: Tensor, count: int) -> Tensor:
    """The mean over adapters of an adapter-major batch: (count * batch, ...) -> (batch, ...)."""
    if count == 1:
        return predictions
    return predictions.view(count, -1, *predictions.shape[1:]).mean(0)
