"""LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition (arXiv 2311.12023): W = Q + L1 L2, and which bits go where.

Q is NormalFloat (:mod:`adapters.compression.normal_float`), L1 L2 has rank r and absorbs what Q loses. Starting at
Q = 0, the best rank-r part of W - Q and the quantised W - L1 L2 are computed in turn while the error falls; the best
iterate is returned (the authors' program returns the one after it).

With the Fisher information F, the mean square of each weight's gradient over samples, the error is
|sqrt(F) o (W - Q - L1 L2)|. The low-rank step takes F as separable: with Dr, Dc the roots of its row and column means,
the best part of Dr (W - Q) Dc is divided by Dr and Dc again. Q itself is not weighted.

The configuration of each matrix is chosen by an integer program: the least sum of squared errors with at most a given
number of bits per weight. Only matrices that are quantised count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters.compression.normal_float import Configuration, Stored, quantise, rounded
from adapters.errors import InputError

EXACT = 2048
"""Up to this smaller side, singular vectors are exact; above, a seeded random projection finds them."""

FLOOR = 1e-4
"""Smallest Dr and Dc as a share of their largest: dead rows would divide by zero."""


@dataclass(frozen=True)
class Decomposition:
    """W = Q + L1 L2.

    Attributes:
        Q: the stored matrix.
        L1, L2: (out, r) and (r, in), fp32.
        errors: the (weighted) error of each iterate up to the best, falling.
        plain: the (weighted) error of quantising W alone.
    """

    Q: Stored
    L1: Tensor
    L2: Tensor
    errors: tuple[float, ...]
    plain: float


@torch.no_grad()
def decompose(
    W: Tensor, how: Configuration, rank: int, steps: int = 100, fisher: Tensor | None = None, seed: int = 0,
    patience: int = 0,
) -> Decomposition:  # fmt: skip
    """Decompose ``W`` (out, in); computed in fp32.

    Args:
        rank: r; 0 is quantising alone.
        steps: at most so many iterates.
        fisher: F (out, in), not negative; None = every weight counts alike.
        seed: of the random projection for large matrices.
        patience: go on after so many iterates that are worse.

    Raises:
        InputError: a rank or F that does not fit the matrix, or numbers that are not finite.
    """
    W, weights = check(W, rank, fisher)
    split = _Split(weights, W)
    plain = _error(W - rounded(W, how), weights)
    empty = W.new_zeros(W.shape[0], rank), W.new_zeros(rank, W.shape[1])
    if rank == 0:
        return Decomposition(quantise(W, how), *empty, (plain,), plain)
    best: tuple[Tensor, Tensor] | None = None
    residual, worse, errors = W, 0, list[float]()
    for step in range(steps):
        L1, L2 = split(residual, rank, seed + step)
        rest = W - L1 @ L2
        quantised = rounded(rest, how)
        error = _error(rest - quantised, weights)
        if best is not None and error > errors[-1]:
            worse += 1
            if worse > patience:
                break
        else:
            errors.append(error)
            best = L1, L2
        residual = W - quantised
    assert best is not None
    L1, L2 = best
    return Decomposition(quantise(W - L1 @ L2, how), L1, L2, tuple(errors), plain)


@torch.no_grad()
def first_errors(W: Tensor, choices: Sequence[Configuration], rank: int, fisher: Tensor | None = None) -> list[float]:
    """The squared (weighted) error of the first iterate for each configuration.

    All share one low-rank part, so this is cheap; the later iterates only lower the errors.
    """
    W, weights = check(W, rank, fisher)
    rest = W
    if rank:
        L1, L2 = _Split(weights, W)(W, rank, 0)
        rest = W - L1 @ L2
    return [_error(rest - rounded(rest, how), weights) ** 2 for how in choices]


def check(W: Tensor, rank: int, fisher: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W and sqrt(F) in fp32; raises :class:`InputError` as :func:`decompose`."""
    if W.ndim != 2:
        raise InputError(f"Only matrices are decomposed, not a tensor of shape {tuple(W.shape)}.")
    if not 0 <= rank <= min(W.shape):
        raise InputError(f"Rank {rank} does not fit a matrix of {W.shape[0]} x {W.shape[1]}: use 0 to {min(W.shape)}.")
    W = W.detach().float()
    if not bool(W.isfinite().all()):
        raise InputError("The weight holds numbers that are not finite.")
    if fisher is None:
        return W, None
    if fisher.shape != W.shape:
        raise InputError(
            f"The Fisher information has shape {tuple(fisher.shape)}, the weight {tuple(W.shape)}: it was measured on "
            "another model."
        )
    F = fisher.detach().float().to(W.device)
    if not bool((F >= 0).all() & F.isfinite().all()):
        raise InputError("Fisher information is not negative and finite: it is a mean of squares.")
    if not bool(F.any()):
        raise InputError("The Fisher information is zero everywhere: the layer does not take part in the loss.")
    return W, F.sqrt()


class _Split:
    """The best rank-r part of a matrix, weighted by the row and column means of F."""

    def __init__(self, weights: Tensor | None, W: Tensor) -> None:
        self.rows, self.columns = W.new_ones(W.shape[0], 1), W.new_ones(1, W.shape[1])
        if weights is not None:
            F = weights.square()
            self.rows, self.columns = F.mean(1, keepdim=True).sqrt(), F.mean(0, keepdim=True).sqrt()
            self.rows, self.columns = (D.clamp_min(FLOOR * float(D.max())) for D in (self.rows, self.columns))

    def __call__(self, R: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
        """L1 (out, r), L2 (r, in), each with the root of the singular values."""
        R = self.rows * R * self.columns
        if min(R.shape) <= EXACT:
            U, S, Vh = torch.linalg.svd(R, full_matrices=False)
            U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                U, S, V = torch.svd_lowrank(R, q=min(rank + 10, *R.shape), niter=2)
            U, S, Vh = U[:, :rank], S[:rank], V[:, :rank].T
        root = S.sqrt()
        return U * root / self.rows, root[:, None] * Vh / self.columns


def _error(R: Tensor, weights: Tensor | None) -> float:
    return float(torch.linalg.vector_norm(R if weights is None else weights * R))


# ------------------------------------------------------------------------------------------------ which bits go where


@dataclass(frozen=True)
class Allocation:
    """The choice for every matrix.

    Attributes:
        chosen: name -> configuration.
        bits: achieved bits per weight, from the bytes.
        cost: sum of the squared errors.
        solver: "milp" or "greedy" (when the time ran out).
    """

    chosen: dict[str, Configuration]
    bits: float
    cost: float
    solver: str


def allocate(
    costs: Mapping[str, Mapping[Configuration, float]], counts: Mapping[str, int], budget: float, seconds: float = 60
) -> Allocation:
    """The configurations with the least sum of costs within ``budget`` bits per weight.

    Args:
        costs: name -> configuration -> squared error; a matrix may lack configurations that it cannot have.
        counts: name -> weights of the matrix.
        budget: bits per weight over all matrices, their scales included.
        seconds: time limit of the integer program (HiGHS); after it a greedy choice is taken if that is better.

    Raises:
        InputError: the budget is below the least or above the most that the configurations can use.
    """
    total = sum(counts.values())
    sizes = {name: {how: 8.0 * how.stored_bytes(counts[name]) for how in row} for name, row in costs.items()}
    fronts = {name: pareto(row, sizes[name]) for name, row in costs.items()}
    least = sum(sizes[name][front[0]] for name, front in fronts.items()) / total
    most = sum(max(row.values()) for row in sizes.values()) / total
    if budget < least:
        raise InputError(
            f"{budget:g} bits per weight is too little: these matrices need at least {math.ceil(least * 1000) / 1000}."
        )
    if budget > most:
        raise InputError(
            f"{budget:g} bits per weight is more than these configurations can use ({most:.3f}): take less, or the "
            "model as it is."
        )
    greedy = _greedy(fronts, costs, sizes, budget * total)
    chosen, solver = greedy, "greedy"
    found = _milp(fronts, costs, sizes, budget * total, seconds)
    if found is not None and _total(found, costs) <= _total(greedy, costs):
        chosen, solver = found, "milp"
    return Allocation(chosen, _total(chosen, sizes) / total, _total(chosen, costs), solver)


def pareto(costs: Mapping[Configuration, float], sizes: Mapping[Configuration, float]) -> list[Configuration]:
    """The configurations of which no other is both smaller (or equal) and better (or equal), smallest first."""
    front: list[Configuration] = []
    for how in sorted(costs, key=lambda one: (sizes[one], costs[one], one)):
        if not front or costs[how] < costs[front[-1]]:
            front.append(how)
    return front


def _milp(
    fronts: Mapping[str, list[Configuration]],
    costs: Mapping[str, Mapping[Configuration, float]],
    sizes: Mapping[str, Mapping[Configuration, float]],
    limit: float,
    seconds: float,
) -> dict[str, Configuration] | None:
    """The integer program; None if nothing was found in time."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    pairs = [(name, how) for name, front in fronts.items() for how in front]
    cost = np.array([costs[name][how] for name, how in pairs])
    size = np.array([sizes[name][how] for name, how in pairs])
    rows = np.repeat(np.arange(len(fronts)), [len(front) for front in fronts.values()])
    one_each = csr_matrix((np.ones(len(pairs)), (rows, np.arange(len(pairs)))))
    found = milp(
        cost * (1000 / max(float(np.linalg.norm(cost)), 1e-300)),
        constraints=[LinearConstraint(size[None] / limit, ub=1.0), LinearConstraint(one_each, 1, 1)],
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    if found.x is None:
        return None
    picked = {name: how for (name, how), taken in zip(pairs, found.x, strict=True) if taken > 0.5}
    return picked if len(picked) == len(fronts) and _total(picked, sizes) <= limit * (1 + 1e-9) else None


def _greedy(
    fronts: Mapping[str, list[Configuration]],
    costs: Mapping[str, Mapping[Configuration, float]],
    sizes: Mapping[str, Mapping[Configuration, float]],
    limit: float,
) -> dict[str, Configuration]:
    """Bisection over the price of a bit, then the best improvements that still fit."""

    def at(price: float) -> dict[str, Configuration]:
        return {n: min(front, key=lambda how: costs[n][how] + price * sizes[n][how]) for n, front in fronts.items()}

    low, high = 0.0, 1.0
    while _total(at(high), sizes) > limit and high < 1e30:
        high *= 4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _total(at(middle), sizes) <= limit else (middle, high)
    chosen = at(high)
    if _total(chosen, sizes) > limit:
        chosen = {name: front[0] for name, front in fronts.items()}
    room = limit - _total(chosen, sizes)
    while True:
        better = [
            ((costs[n][chosen[n]] - costs[n][how]) / (sizes[n][how] - sizes[n][chosen[n]]), n, how)
            for n, front in fronts.items()
            for how in front
            if 0 < sizes[n][how] - sizes[n][chosen[n]] <= room
        ]
        if not better:
            return chosen
        _, name, how = max(better)
        room -= sizes[name][how] - sizes[name][chosen[name]]
        chosen[name] = how


def _total(chosen: Mapping[str, Configuration], values: Mapping[str, Mapping[Configuration, float]]) -> float:
    return sum(values[name][how] for name, how in chosen.items())
