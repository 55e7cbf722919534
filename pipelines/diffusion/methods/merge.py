"""Merge: all adapters at once, in one prediction per step.

    eps = denoiser with  W0 + sum_i w_i s_i B_i A_i

The usual way to use several LoRAs, and the baseline of "Multi-LoRA Composition for Image Generation"
(arXiv 2402.16843). It costs the same as one adapter; with many strong adapters concepts bleed into each other.
"""

from __future__ import annotations

from adapters.catalogue import Method
from pipelines.diffusion.methods.step import Step, Strengths

METHOD = Method(
    name="merge",
    title="Merge",
    summary="All adapters act at once in every step: fastest, and the result can be exported as one LoRA.",
    stage="compose",
    makes="picture",
    paper="Multi-LoRA Composition for Image Generation, arXiv 2402.16843 (baseline)",
    entry="pipelines.diffusion.methods.merge:steps",
    properties={"position": 0, "text": "together", "constant": True},
)


def steps(strengths: Strengths) -> list[Step]:
    """One joint prediction per step with every adapter at its strength."""
    return [Step(row) for row in strengths]
