"""What a method can use before the first step: the adapters, their trigger words, the prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.errors import InputError
from adapters.formats.lora import LoraLayer

FLOOR = 0.05
"""Smallest relevance of an adapter, before normalisation."""


@dataclass(frozen=True, eq=False)
class MethodContext:
    """The composition of a call.

    Attributes:
        names: of the adapters.
        layers: per adapter, its layers in the denoiser.
        triggers: per adapter, its trigger words.
        prompt: the prompt; None while only planning.
        embed: text -> its mean-pooled embedding (width,), by the base model's text encoders.
    """

    names: tuple[str, ...] = ()
    layers: tuple[Mapping[str, LoraLayer], ...] = ()
    triggers: tuple[tuple[str, ...], ...] = ()
    prompt: str | None = None
    embed: Callable[[str], Tensor] | None = None

    def need_triggers(self, method: str) -> None:
        """Raise :class:`InputError` if an adapter has no trigger words."""
        silent = [name for name, words in zip(self.names, self.triggers, strict=True) if not words]
        if silent:
            raise InputError(
                f"'{method}' weights adapters by their trigger words, which are missing: give {', '.join(silent)} "
                "triggers."
            )

    def closeness(self, first: str, second: str) -> float:
        """Cosine similarity of the embeddings of two texts."""
        assert self.embed is not None
        return float(torch.nn.functional.cosine_similarity(self.embed(first).float(), self.embed(second).float(), 0))


def without(prompt: str, words: tuple[str, ...]) -> str:
    """``prompt`` without these words, with commas and spaces tidied."""
    for word in words:
        prompt = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", " ", prompt, flags=re.IGNORECASE)
    return re.sub(r"\s+", " ", re.sub(r"(\s*,)+", ",", prompt)).strip(" ,")


def normalised(values: list[float]) -> tuple[float, ...]:
    """``values``, at least :data:`FLOOR` each, scaled to sum to 1."""
    raised = [max(FLOOR, value) for value in values]
    return tuple(value / sum(raised) for value in raised)
