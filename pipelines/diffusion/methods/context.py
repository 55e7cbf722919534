"""What a method may look at before the first step: the adapters themselves, their trigger words, the prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.errors import InputError
from adapters.formats.lora import LoraLayer

FLOOR = 0.05
"""Smallest relevance of an adapter before the relevances are made to sum to 1."""


@dataclass(frozen=True, eq=False)
class MethodContext:
    """A composition that is about to be drawn.

    Attributes:
        names: the adapters.
        layers: for each its layers in the denoiser.
        triggers: for each the words that call it.
        prompt: what is to be drawn; None while only planning.
        embed: text -> its mean-pooled embedding (width,), by the base model's text encoders.
    """

    names: tuple[str, ...] = ()
    layers: tuple[Mapping[str, LoraLayer], ...] = ()
    triggers: tuple[tuple[str, ...], ...] = ()
    prompt: str | None = None
    embed: Callable[[str], Tensor] | None = None

    def need_triggers(self, method: str) -> None:
        """Refuse adapters without trigger words; raises :class:`InputError`."""
        silent = [name for name, words in zip(self.names, self.triggers, strict=True) if not words]
        if silent:
            raise InputError(
                f"'{method}' weighs adapters by their trigger words; give {', '.join(silent)} triggers, there are none."
            )

    def closeness(self, first: str, second: str) -> float:
        """Cosine of the embeddings of two texts."""
        assert self.embed is not None
        return float(torch.nn.functional.cosine_similarity(self.embed(first).float(), self.embed(second).float(), 0))


def without(prompt: str, words: tuple[str, ...]) -> str:
    """``prompt`` without these words; what is left is tidied."""
    for word in words:
        prompt = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", " ", prompt, flags=re.IGNORECASE)
    return re.sub(r"\s+", " ", re.sub(r"(\s*,)+", ",", prompt)).strip(" ,")


def normalised(values: list[float]) -> tuple[float, ...]:
    """Positive numbers that sum to 1."""
    raised = [max(FLOOR, value) for value in values]
    return tuple(value / sum(raised) for value in raised)
