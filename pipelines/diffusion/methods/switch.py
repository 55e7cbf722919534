"""Switch: one adapter at a time, taking turns over the steps.

"Multi-LoRA Composition for Image Generation" (arXiv 2402.16843), LoRA Switch: step k uses adapter

    floor((k mod N tau) / tau)

so each adapter acts for tau steps in turn. One prediction per step for any N. (The authors' code switches after steps
tau, 2 tau, ... and so gives the first adapter one step more; here all turns are equally long.)
"""

from __future__ import annotations

from adapters.catalogue import Method
from pipelines.diffusion.methods.step import Step, Strengths

METHOD = Method(
    name="switch",
    title="LoRA Switch",
    summary="One adapter per step, in turns of tau steps: as fast as one adapter, and they never mix within a step.",
    stage="compose",
    makes="picture",
    paper="Multi-LoRA Composition for Image Generation, arXiv 2402.16843",
    entry="pipelines.diffusion.methods.switch:steps",
    properties={"position": 1, "official_text": "first", "turns": True, "order_matters": True},
)


def turn(k: int, count: int, tau: int) -> int:
    """The adapter whose turn step k is."""
    return (k % (count * tau)) // tau


def steps(strengths: Strengths, tau: int = 1) -> list[Step]:
    """One prediction per step with the adapter whose turn it is."""
    made = []
    for k, row in enumerate(strengths):
        chosen = turn(k, len(row), tau) if row else 0
        made.append(Step(tuple(strength if i == chosen else 0.0 for i, strength in enumerate(row))))
    return made
