"""What server and clients exchange: tensors by name, and what the server makes of them.

Of a layer ``name``, with y = W0 x + s B A x or y = W0 x + s B R A x:

    name.lora_A (r, in)     name.lora_B (out, r)     name.lora_R (r, r)

Any other name is a tensor trained as a whole (a new classification head), which every rule averages. Weights p_k are
normalised over the clients that replied.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from adapters.errors import InputError, nearest
from adapters.low_rank import norm

State = Mapping[str, Tensor]
Factors = tuple[Tensor, Tensor]
"""left (out, q) and right (q, in) of a product."""

A, B, R = ".lora_A", ".lora_B", ".lora_R"


@dataclass(frozen=True)
class Options:
    """Choices of the rules; each uses those it names.

    Attributes:
        rank: of the aggregated pair (FlexLoRA); None = the largest of the clients'.
        correction: how LoRA-FAIR measures the distance to the ideal update.
        strength: LoRA-FAIR's lambda.
    """

    rank: int | None = None
    correction: Literal["ridge", "cosine", "none"] = "ridge"
    strength: float = 0.01


@dataclass(frozen=True)
class Aggregate:
    """The server's result of a round.

    Attributes:
        tensors: what clients begin the next round with.
        residual: layer -> factors of what is added to W0, without s.
        report: layer -> measures of the aggregation.
    """

    tensors: dict[str, Tensor]
    residual: dict[str, Factors] = field(default_factory=dict)
    report: dict[str, dict[str, float]] = field(default_factory=dict)


Rule = Callable[[Sequence[State], Sequence[float], Options], Aggregate]


# ------------------------------------------------------------------------------------------------ weights and names


def shares(weights: Sequence[float]) -> list[float]:
    """p_k = n_k / sum n.

    Raises:
        InputError: no client, a weight below 0 or not finite, or only zeros.
    """
    total = sum(weights)
    if not weights or not all(0 <= weight < float("inf") for weight in weights) or not total > 0:
        raise InputError(f"Clients are weighted by numbers of examples, not by {list(weights)}: give each above 0.")
    return [weight / total for weight in weights]


def layers(state: State, ending: str = A) -> list[str]:
    """Names of the layers of which ``state`` holds the factor ``ending``."""
    return [name.removesuffix(ending) for name in state if name.endswith(ending)]


def others(state: State) -> list[str]:
    """Names of the tensors that are trained as a whole."""
    return [name for name in state if not name.endswith((A, B, R))]


def mean(replies: Sequence[State], weights: Sequence[float], names: Sequence[str]) -> dict[str, Tensor]:
    """sum_k p_k x_k of each of ``names``."""
    p = shares(weights)
    return {name: _sum(share * reply[name] for share, reply in zip(p, replies, strict=True)) for name in names}


def stacked(replies: Sequence[State], weights: Sequence[float], layer: str) -> Factors:
    """[p_1 B_1 .. p_K B_K] (out, K r) and [A_1; ..; A_K] (K r, in), whose product is the ideal sum_k p_k B_k A_k."""
    p = shares(weights)
    left = torch.cat([share * reply[layer + B] for share, reply in zip(p, replies, strict=True)], dim=1)
    return left, torch.cat([reply[layer + A] for reply in replies])


def deviation(replies: Sequence[State], weights: Sequence[float], layer: str) -> Factors:
    """Factors of E = sum_k p_k B_k A_k - Bm Am = sum_k p_k (B_k - Bm)(A_k - Am), with Am and Bm the means.

    Since sum_k p_k (B_k - Bm) = 0, the last client's term is in the others': E = sum_{k<K} p_k (B_k - Bm)(A_k - A_K),
    of rank (K - 1) r.
    """
    p = shares(weights)
    centre = mean(replies, weights, [layer + B])[layer + B]
    *first, last = replies
    left = [share * (reply[layer + B] - centre) for share, reply in zip(p, first, strict=False)]
    right = [reply[layer + A] - last[layer + A] for reply in first]
    if not first:
        return centre[:, :0], last[layer + A][:0]
    return torch.cat(left, dim=1), torch.cat(right)


def bias(replies: Sequence[State], weights: Sequence[float], layer: str) -> float:
    """|sum p_k B_k A_k - Bm Am|_F / |sum p_k B_k A_k|_F: how far averaged factors are from the averaged product."""
    ideal = exact_norm(*stacked(replies, weights, layer))
    return exact_norm(*deviation(replies, weights, layer)) / ideal if ideal > 0 else 0.0


def exact_norm(left: Tensor, right: Tensor) -> float:
    """|L R|_F in fp64: Gram matrices of nearly equal factors cancel in fp32."""
    return float(norm(left.double(), right.double()))


def _sum(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms).clone()
    for term in terms:
        total += term
    return total


# ------------------------------------------------------------------------------------------------ checks


def check_reply(reply: State, expected: Mapping[str, Sequence[int]], client: str, ragged: bool = False) -> None:
    """Refuse a reply that cannot be averaged.

    Args:
        expected: name -> shape of what the client was asked for.
        ragged: ranks may differ.

    Raises:
        InputError: names the client and the tensor: missing or additional names, other shapes, whole numbers, bf16,
            or numbers that are not finite.
    """
    for name in expected:
        if name not in reply:
            raise InputError(f"The client '{client}' sent no '{name}': it trains other layers or another method.")
    for name, tensor in reply.items():
        if name not in expected:
            raise InputError(f"The client '{client}' sent '{name}'{nearest(name, expected)}, which was not asked for.")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise InputError(f"The client '{client}' sent '{name}' as {tensor.dtype}: cast it to float32 first.")
        if not _fits(name, tensor.shape, tuple(expected[name]), ragged):
            raise InputError(
                f"The client '{client}' sent '{name}' of shape {tuple(tensor.shape)}, not {tuple(expected[name])}."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"The client '{client}' sent numbers that are not finite in '{name}'.")


def layer_shapes(
    state: State, names: Iterable[str], inputs: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, int]]:
    """The shapes that A and B of these layers have if they belong together: A's rank is B's, and A reads the inputs.

    Args:
        inputs: layer -> shape of A without its rank; of others, A's own is taken.
    """
    found: dict[str, tuple[int, int]] = {}
    for name in names:
        (rank, width), (out, _) = sides(state.get(name + A)), sides(state.get(name + B))
        found |= {name + A: (rank, math.prod(inputs[name]) if name in inputs else width), name + B: (out, rank)}
    return found


def sides(tensor: Tensor | None) -> tuple[int, int]:
    """The shape of a matrix that is not empty; of anything else (1, 1), which it does not have."""
    rows, columns = tensor.shape if tensor is not None and tensor.ndim == 2 else (1, 1)
    return max(rows, 1), max(columns, 1)


def _fits(name: str, given: Sequence[int], wanted: Sequence[int], ragged: bool) -> bool:
    given, wanted = tuple(given), tuple(wanted)
    if ragged and name.endswith(A):
        return given[1:] == wanted[1:] and len(given) == len(wanted) and given[0] > 0
    if ragged and name.endswith(B):
        return given[0] == wanted[0] and len(given) == len(wanted) == 2 and given[1] > 0
    return given == wanted


def digest(state: State) -> str:
    """A fingerprint of tensors and their names, by which a client shows that it has the same frozen factors."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().float().contiguous()
        found.update(f"{name}{tuple(tensor.shape)}".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]
