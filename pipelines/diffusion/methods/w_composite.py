"""W-Composite: the mean of LoRA Composite, weighted by how close an adapter is to the prompt.

"Prompt-aware" weighting of multi-LoRA composition (arXiv 2606.03792), W-Composite:

    eps = sum_i w_i eps_i,     w_i = max(0.05, cos(e(prompt), e(triggers of i))), divided by their sum

with e(.) the mean-pooled text embedding and eps_i the denoiser with adapter i alone. Equal weights are LoRA Composite.
The authors have no floor here, only in W-Switch: in their version an adapter whose words are far from the prompt gets
a weight of zero or below. Adapters not used in a step are left out of its mean. N predictions per step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.catalogue import Method
from pipelines.diffusion.denoise import Denoising
from pipelines.diffusion.methods.context import MethodContext, normalised
from pipelines.diffusion.methods.step import Step, Strengths

METHOD = Method(
    name="w-composite",
    title="W-Composite",
    summary="LoRA Composite whose mean is weighted by how close each adapter's trigger words are to the prompt.",
    stage="compose",
    makes="picture",
    paper="Prompt-aware multi-LoRA composition (W-Switch, W-Composite), arXiv 2606.03792",
    entry="pipelines.diffusion.methods.w_composite:steps",
    properties={"position": 12, "needs_prompt": True},
)


@dataclass(frozen=True)
class WeightedStep(Step):
    """A step with a share for the prediction of each adapter."""

    shares: tuple[float, ...] = ()


class Run(Denoising):
    """Averages predictions by their shares."""

    def reduce(self, predictions: Tensor) -> Tensor:
        step = self.steps[min(self.step, len(self.steps) - 1)]
        assert isinstance(step, WeightedStep)
        return weighted(predictions, [step.shares[i] for i in step.active])


def steps(strengths: Strengths, context: MethodContext) -> list[Step]:
    """Separate predictions per step; without a prompt (a plan) all shares are equal."""
    context.need_triggers("w-composite")
    count = len(strengths[0]) if strengths else 0
    shares = weights(context) if context.prompt is not None else (1 / max(count, 1),) * count
    return [WeightedStep(row, separate=True, shares=shares) for row in strengths]


def weights(context: MethodContext) -> tuple[float, ...]:
    """w_i, summing to 1."""
    prompt = context.prompt or ""
    return normalised([context.closeness(prompt, ", ".join(words)) for words in context.triggers])


def weighted(predictions: Tensor, shares: list[float]) -> Tensor:
    """The mean over adapters of adapter-major (n * batch, ...) -> (batch, ...), by shares normalised to sum to 1."""
    parts = predictions.view(len(shares), -1, *predictions.shape[1:])
    factors = torch.tensor(shares, dtype=torch.float32, device=parts.device)
    return torch.einsum("n,n...->...", (factors / factors.sum()).to(parts), parts)
