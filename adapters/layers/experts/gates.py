"""From a router's logits to gates: which experts a token uses, and how much of each."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which products on x's device keep the precision they are given."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


@dataclass(frozen=True)
class Gates:
    """The gates of a batch of T tokens.

    Attributes:
        values: (T, k), or (T, N) if every expert is used.
        chosen: (T, k) numbers of experts, each at most once per token; None if every expert is used.
        experts: N.
        plain: every gate is 1, with no gradient: one LoRA without a router.
        whole: the gates of each token sum to 1 by construction.
    """

    values: Tensor
    chosen: Tensor | None
    experts: int
    plain: bool = False
    whole: bool = False

    def dense(self) -> Tensor:
        """(T, N), 0 for experts that are not chosen."""
        if self.chosen is None:
            return self.values
        return self.values.new_zeros(self.values.shape[0], self.experts).scatter(1, self.chosen, self.values)

    def total(self) -> Tensor:
        """(T, 1), the sum of each token's gates."""
        return self.values.sum(1, keepdim=True)

    def numbers(self) -> Tensor:
        """(T, k) numbers of the used experts."""
        if self.chosen is not None:
            return self.chosen
        every = torch.arange(self.experts, device=self.values.device)
        return every.expand(self.values.shape[0], self.experts)


def one_expert(x: Tensor) -> Gates:
    """Gate 1 for the only expert, for T tokens x (T, in)."""
    values = torch.ones(x.shape[0], 1, dtype=x.dtype, device=x.device)
    return Gates(values, torch.zeros_like(values, dtype=torch.long), 1, plain=True, whole=True)


def choose(probabilities: Tensor, router: str, k: int, gate: str) -> Gates:
    """The gates for softmax probabilities (T, N), as :class:`~adapters.layers.experts.config.MoeConfig` names them.

    A gate that is always 1 keeps a gradient of exactly 0, so that every router has one (DDP needs it).
    """
    experts = probabilities.shape[1]
    if router == "dense":
        return Gates(probabilities, None, experts, whole=True)
    p, chosen = probabilities.topk(k, dim=1)
    if gate == "renormalised":
        p = p / p.sum(1, keepdim=True)
    elif gate == "one":
        p = torch.ones_like(p) + 0.0 * p
    elif gate == "straight_through":
        p = p / p.detach()
    return Gates(p, chosen, experts, whole=gate == "renormalised" or (gate == "one" and k == 1))
