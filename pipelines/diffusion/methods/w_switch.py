"""W-Switch: turns as in LoRA Switch, longer for adapters that matter more for the prompt.

"Prompt-aware" weighting of multi-LoRA composition (arXiv 2606.03792), W-Switch. With e(.) the mean-pooled text
embedding,

    w_i   = max(0.05, 1 - cos(e(prompt), e(prompt without the triggers of i))),  then divided by their sum
    turn  = max(1, round(tau w_i / max_j w_j))  steps

The adapter whose words change the meaning of the prompt most acts for tau steps in a row, others for fewer. Equal
weights are LoRA Switch. One prediction per step. (The paper's option to reserve the last steps for a character is left
out: a schedule does the same.)
"""

from __future__ import annotations

from adapters.catalogue import Method
from pipelines.diffusion.methods.context import MethodContext, normalised, without
from pipelines.diffusion.methods.step import Step, Strengths

METHOD = Method(
    name="w-switch",
    title="W-Switch",
    summary="LoRA Switch whose turns (up to tau steps) are longer for adapters that matter more for the prompt.",
    stage="compose",
    makes="picture",
    paper="Prompt-aware multi-LoRA composition (W-Switch, W-Composite), arXiv 2606.03792",
    entry="pipelines.diffusion.methods.w_switch:steps",
    properties={"position": 13, "turns": True, "order_matters": True, "needs_prompt": True},
)


def steps(strengths: Strengths, context: MethodContext, tau: int = 1) -> list[Step]:
    """One prediction per step with the adapter whose turn it is; without a prompt (a plan) all turns are tau."""
    context.need_triggers("w-switch")
    count = len(strengths[0]) if strengths else 0
    turns = lengths(weights(context), tau) if context.prompt is not None else [tau] * count
    order = [i for i, length in enumerate(turns) for _ in range(length)]
    return [
        Step(tuple(value if i == order[k % len(order)] else 0.0 for i, value in enumerate(row))) if order else Step(row)
        for k, row in enumerate(strengths)
    ]


def weights(context: MethodContext) -> tuple[float, ...]:
    """w_i, summing to 1."""
    prompt = context.prompt or ""
    return normalised([1 - context.closeness(prompt, without(prompt, words)) for words in context.triggers])


def lengths(shares: tuple[float, ...], tau: int) -> list[int]:
    """Steps per turn of every adapter."""
    return [max(1, round(tau * share / max(shares))) for share in shares]
