"""Text encoder LoRAs: which prompt encoding each prediction uses.

te_mode       Merge                    Switch                         Composite
per_adapter   -                        encoding of the step's adapter encoding of each prediction's adapter
merged        all adapters' encoders   all adapters' encoders         all adapters' encoders
official      all adapters' encoders   the first adapter's encoder    all adapters' encoders
auto          merged                   per_adapter                    per_adapter

"official" is what the code of arXiv 2402.16843 does. An encoding is named by the set of adapters whose text encoder
LoRAs are active: ``()`` is the base model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from adapters.errors import InputError
from pipelines.diffusion import methods
from pipelines.diffusion.methods.step import Step, TextAdapters

TextMode = Literal["auto", "per_adapter", "official", "merged"]
MODES: tuple[TextMode, ...] = ("auto", "per_adapter", "official", "merged")


def resolve_mode(mode: str, method: str) -> TextMode:
    """``mode``, checked, with "auto" resolved.

    Raises:
        InputError: an unknown mode, or one that the method does not support.
    """
    if mode not in MODES:
        raise InputError(f"Unknown te_mode '{mode}': use one of {', '.join(MODES)}.")
    together = methods.properties(method).text == "together"
    if mode == "auto":
        return "merged" if together else "per_adapter"
    if mode == "per_adapter" and together:
        raise InputError(
            f"te_mode 'per_adapter' needs a method with one adapter per prediction: use 'merged' with {method}."
        )
    return next(known for known in MODES if known == mode)


def text_adapters(step: Step, mode: TextMode, method: str, strengths: Mapping[int, float]) -> list[TextAdapters]:
    """The name of the encoding of each prediction of a step.

    Args:
        step: the step.
        mode: resolved mode.
        method: the composition method.
        strengths: adapter -> strength in the text encoders, for adapters that act there.
    """
    predictions = max(1, len(step.active)) if step.separate else 1
    if mode == "per_adapter":
        active = step.active[:predictions] or (-1,)  # no adapter: the base model's encoding
        return [(i,) if i in strengths else () for i in active]
    if mode == "official" and methods.properties(method).official_text == "first":
        return [(0,) if 0 in strengths else ()]
    return [tuple(sorted(strengths))] * predictions
