"""Configurations of the jobs on intruder dimensions: forgetting at every lambda, softened copies of an adapter."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from studio.schema import JobConfig


def _strength(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("lambda must be 0 (remove) or more (1 changes nothing)")
    return value


Strength = Annotated[float, AfterValidator(_strength)]
"""A lambda."""


class IntruderFields(JobConfig):
    """Which adapter, and what counts as an intruder."""

    adapter: str = Field(min_length=1, description="Name in the library, file or PEFT folder.")
    base: str = Field(min_length=1, description="The untouched base model: name in the library, folder or hub id.")
    k: int = Field(10, ge=1, description="How many of the largest singular directions to compare.")
    eps: float = Field(0.5, gt=0, le=1, description="An intruder's cosines with the base's directions are below this.")


class ForgettingConfig(IntruderFields):
    """Losses at every lambda, and of the whole update shrunk to the same size."""

    kind: ClassVar[str] = "forgetting"

    old: str = Field(
        min_length=1, description="What the base knew: a folder of pictures, or a text file (language models)."
    )
    new: str = Field("", description="What the adapter learnt, in the same form.")
    strengths: list[Strength] = Field(
        [1.0, 0.75, 0.5, 0.25, 0.0], min_length=1, description="Lambdas: 0 removes intruders, 1 changes nothing."
    )


class SoftenConfig(IntruderFields):
    """An adapter with its intruders scaled, and the control."""

    kind: ClassVar[str] = "soften"

    strength: Strength = Field(0.75, description="Lambda: 0 removes intruders, 1 changes nothing, more amplifies them.")
    recompress: bool = Field(False, description="Cut every layer back to its rank.")
