"""Which expert takes which tokens: what the routers of a mixture do on given texts, group by group.

For a router with N experts, a token t gives expert e the weight w_te: 1/k if e is among its k chosen ones, and for
dense routers and X-LoRA its gate over the sum of its gates. The *load* of an expert is the mean of w_te over the tokens
of a group and sums to 1 over the experts; the *entropy* of a group is the mean of H(p_t) / ln N over its tokens, 1
where the router does not decide at all. Nothing is trained and nothing of the model changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.errors import InputError
from adapters.layers.experts.routing import Record, routing_of, watched

LEFT_OUT = -1
"""Group of a token that is not counted."""

Batch = tuple[Mapping[str, Any], Tensor]
"""The arguments of a forward pass with ``input_ids`` (B, T), and the group of each token (B, T)."""


@dataclass(frozen=True)
class Usage:
    """What one router did.

    Attributes:
        module, layer: where ("" for the gates of a whole X-LoRA).
        load: of each expert, over all tokens.
        groups: group -> the load of each expert over its tokens.
        entropy: of a token's probabilities, 0 to 1, mean over all tokens; ``entropies`` by group.
        tokens: for each expert the ids of the tokens that are most its own, most first.
    """

    module: str
    layer: int | None
    load: tuple[float, ...]
    groups: Mapping[str, tuple[float, ...]]
    entropy: float
    entropies: Mapping[str, float]
    tokens: tuple[tuple[int, ...], ...]

    @property
    def busiest(self) -> float:
        """Largest load over an even one: 1 is even, N is one expert for everything."""
        return max(self.load) * len(self.load)

    @property
    def unused(self) -> int:
        """Experts without a token."""
        return sum(load == 0 for load in self.load)

    @property
    def apart(self) -> float:
        """How differently two groups are routed: the largest total variation distance of their loads, 0 to 1."""
        pairs = combinations(self.groups.values(), 2)
        return max((sum(abs(a - b) for a, b in zip(*pair, strict=True)) / 2 for pair in pairs), default=0.0)


@torch.no_grad()
def usage(
    model: nn.Module, batches: Iterable[Batch], groups: Sequence[str], adapter: str = "default", shown: int = 6
) -> list[Usage]:
    """Run the model on batches and report every router, in the model's order.

    Args:
        groups: names of the groups, by number.
        shown: tokens to name for each expert.

    Raises:
        InputError: the model has no router, or there is no token to count.
    """
    seen: dict[str, _Seen] = {}
    counted: list[Tensor] = []
    kinds: list[Tensor] = []
    for inputs, group in batches:
        kept = (group != LEFT_OUT).flatten()
        counted.append(inputs["input_ids"].flatten()[kept].cpu())
        kinds.append(group.flatten()[kept].cpu())
        with watched(model) as routing:
            model(**inputs)
            for name, record in _decisions(model, routing.records.get(adapter, {})):
                one, weights = seen.setdefault(name, _Seen(record.layer, [], [])), weights_of(record)
                own = kept.to(weights.device)
                p = weights if record.chosen is None else record.probabilities
                one.weights.append(weights.flatten(0, 1)[own].cpu())
                one.entropies.append(_entropy(p).flatten()[own].cpu())
            routing.records = {}
    if not counted or not sum(map(len, counted)):
        raise InputError("There is no token to look at: give texts.")
    if not seen:
        raise InputError("The adapter has no router: every layer has one expert, which takes every token.")
    ids, kind = torch.cat(counted), torch.cat(kinds)
    return [_used(name, one, ids, kind, groups, shown) for name, one in seen.items()]


@dataclass
class _Seen:
    """A router's decisions, batch by batch: (tokens, N) and (tokens,)."""

    layer: int | None
    weights: list[Tensor]
    entropies: list[Tensor]


def _decisions(model: nn.Module, records: Mapping[str, Record]) -> Iterable[tuple[str, Record]]:
    """(name, record) of each router in the last forward pass; one where all modules have the same gates (X-LoRA)."""
    source = routing_of(model).source
    if records and source is not None and source.last.ndim == 3:  # type: ignore[attr-defined]
        return [("", replace(next(iter(records.values())), layer=None))]
    return records.items()


def weights_of(record: Record) -> Tensor:
    """(B, T, N) of a router's choices, each token's summing to 1."""
    p = record.probabilities
    if record.chosen is None:
        return p.clamp_min(0) / p.clamp_min(0).sum(-1, keepdim=True).clamp_min(1e-9)
    return F.one_hot(record.chosen, p.shape[-1]).sum(2).to(p.dtype) / record.chosen.shape[-1]


def _entropy(p: Tensor) -> Tensor:
    """H(p) / ln N, for p (..., N)."""
    if p.shape[-1] < 2:
        return torch.zeros_like(p[..., 0])
    return -(p * p.clamp_min(1e-30).log()).sum(-1) / math.log(p.shape[-1])


def _used(name: str, seen: _Seen, ids: Tensor, kind: Tensor, groups: Sequence[str], shown: int) -> Usage:
    weights, entropies = torch.cat(seen.weights), torch.cat(seen.entropies)
    inside = {group: kind == number for number, group in enumerate(groups) if bool((kind == number).any())}
    return Usage(
        name, seen.layer, _mean(weights), {group: _mean(weights[own]) for group, own in inside.items()},
        float(entropies.mean()), {group: float(entropies[own].mean()) for group, own in inside.items()},
        own_tokens(ids, weights, shown),
    )  # fmt: skip


def _mean(weights: Tensor) -> tuple[float, ...]:
    return tuple(weights.double().mean(0).tolist())


def own_tokens(ids: Tensor, weights: Tensor, shown: int) -> tuple[tuple[int, ...], ...]:
    """For each expert the tokens it takes far more often than its load says, most first.

    A token counts as c_e (ln c_e / n - ln load_e), c_e the weight it gives the expert in its n occurrences: rare tokens
    do not win by chance, frequent ones only if they are the expert's own.

    Args:
        ids: (tokens,); ``weights``: (tokens, N).
    """
    kinds, where = ids.unique(return_inverse=True)
    often = torch.bincount(where, minlength=len(kinds)).double()
    taken = torch.zeros(len(kinds), weights.shape[1], dtype=torch.float64).index_add(0, where, weights.double())
    load = weights.double().mean(0)
    score = taken * ((taken / often[:, None]).clamp_min(1e-12).log() - load.clamp_min(1e-12).log())
    best = score.argsort(0, descending=True)[:shown]
    return tuple(
        tuple(int(kinds[row]) for row in best[:, expert] if score[row, expert] > 0)
        for expert in range(weights.shape[1])
    )
