"""LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement, arXiv 2411.14961 (ICCV 2025).

The server averages A and B as FedIT does (Am, Bm) and corrects Bm, so that the product comes nearer to the ideal
dW = sum_k p_k B_k A_k while B stays a good start for the next round:

    B = Bm + argmin_X  D(dW, (Bm + X) Am) + lambda |X|_F^2,   A = Am

``cosine`` (the paper's): D = 1 - cos. The cosine ignores the length of Y = Bm + X; for a direction U the best length is
<U, Bm> / |U|^2, so with d = |dW| and M = dW Am^T the direction minimises

    - <M, U> / (d |U Am|) - lambda <U, Bm>^2 / |U|^2

``ridge`` (ours, the default): D = |dW - (Bm + X) Am|_F^2 with a penalty relative to the size of Am, in closed form:

    X = E Am^T (G + mu I)^-1,   G = Am Am^T,   mu = lambda tr(G) / r,   E = dW - Bm Am

lambda -> 0 gives least squares (the cosine mode's direction, and the right length), lambda -> infinity gives FedIT.
No correction of B leaves the row space of Am: the least residual is |dW (I - P)|, P = Am^T G^-1 Am. Everything is
computed from factors, never from an (out, in) matrix. Clients and traffic are FedIT's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.federated.state import A, Aggregate, B, Options, State, deviation, layers, mean, stacked
from adapters.low_rank import norm

METHOD = Method(
    name="lora-fair",
    title="LoRA-FAIR",
    summary="Averages A and B and corrects B on the server, so that their product is nearer to the averaged product; "
    "clients and traffic as with FedIT.",
    stage="federated",
    makes="ordinary LoRA",
    paper="LoRA-FAIR, arXiv 2411.14961",
    entry="adapters.federated.lora_fair:aggregate",
    properties={"trains": "A and B"},
)

CONDITION = 1e-10
"""Below this share of the largest eigenvalue of G, Am counts as rank-deficient."""

LARGEST = 10.0
"""A correction longer than this many times Bm has diverged; the layer then keeps FedIT's mean."""


def aggregate(replies: Sequence[State], weights: Sequence[float], options: Options) -> Aggregate:
    """The means with B corrected, and per layer the distance to the ideal update before and after.

    Raises:
        InputError: lambda below 0, or 0 with an averaged A below full rank.
    """
    if not options.strength >= 0:
        raise InputError(f"LoRA-FAIR's lambda must be 0 or more, got {options.strength}.")
    tensors, report = mean(replies, weights, list(replies[0])), {}
    for name in layers(replies[0]):
        ideal, drift = stacked(replies, weights, name), deviation(replies, weights, name)
        Am, Bm = tensors[name + A], tensors[name + B]
        try:
            X = correction(ideal, drift, Am, Bm, options)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        limit = LARGEST * max(float(torch.linalg.vector_norm(Bm)), 1e-12)
        diverged = not bool(torch.isfinite(X).all()) or float(torch.linalg.vector_norm(X)) > limit
        tensors[name + B] = Bm if diverged else Bm + X
        report[name] = _measures(ideal, Am, Bm, tensors[name + B]) | ({"diverged": 1.0} if diverged else {})
    return Aggregate(tensors, report=report)


def correction(
    ideal: tuple[Tensor, Tensor], drift: tuple[Tensor, Tensor], Am: Tensor, Bm: Tensor, options: Options
) -> Tensor:
    """X (out, r) of one layer.

    Args:
        ideal, drift: factors of dW and of E = dW - Bm Am.
    """
    if options.correction == "none" or math.isinf(options.strength):
        return torch.zeros_like(Bm)
    if options.correction == "ridge":
        return ridge(drift[0] @ (drift[1] @ Am.T), Am, options.strength)
    return cosine(ideal[0] @ (ideal[1] @ Am.T), norm(*ideal), Am, Bm, options.strength)


def ridge(EAt: Tensor, Am: Tensor, strength: float) -> Tensor:
    """X = (E Am^T)(G + mu I)^-1 from E Am^T (out, r).

    Raises:
        InputError: lambda = 0 and an Am below full rank.
    """
    G = Am @ Am.T
    if strength == 0:
        values = torch.linalg.eigvalsh(G)
        if not float(values[0]) > CONDITION * float(values[-1]):
            raise InputError("The averaged A has less than its full rank, which lambda = 0 cannot correct: raise it.")
    mu = strength * G.trace() / G.shape[0]
    return torch.linalg.solve(G + mu * torch.eye(G.shape[0], dtype=G.dtype, device=G.device), EAt.T).T


def cosine(M: Tensor, length: Tensor, Am: Tensor, Bm: Tensor, strength: float) -> Tensor:
    """X of the paper's cosine mode, by L-BFGS from X = 0 in fp64 on the direction U (whitened: V = U G^(1/2)).

    Args:
        M: dW Am^T (out, r).
        length: |dW|.
    """
    if not float(length) > 0 or not bool(Bm.any()):
        return torch.zeros_like(Bm)
    M64, B64, A64 = M.double() / float(length), Bm.double(), Am.double()
    values, vectors = torch.linalg.eigh(A64 @ A64.T)
    root = values.clamp_min(CONDITION * float(values[-1])).sqrt()
    into, back = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
    N = M64 @ back
    V = (B64 @ into).div_(torch.linalg.vector_norm(B64 @ into)).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [V], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, history_size=20, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        U = V @ back
        return -(N * V).sum() / torch.linalg.vector_norm(V) - strength * (U * B64).sum().square() / U.square().sum()

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = objective()
        value.backward()
        return value

    optimiser.step(closure)
    U = V.detach() @ back
    overlap = (U * B64).sum()
    if not float(overlap) > 0:  # the best direction has no length near Bm
        return torch.zeros_like(Bm)
    return (U * (overlap / U.square().sum()) - B64).to(Bm)


def _measures(ideal: tuple[Tensor, Tensor], Am: Tensor, Bm: Tensor, corrected: Tensor) -> dict[str, float]:
    ideal, Am, Bm, corrected = (ideal[0].double(), ideal[1].double()), Am.double(), Bm.double(), corrected.double()
    whole, size = float(norm(*ideal)), float(torch.linalg.vector_norm(Bm))
    found = {"correction": float(torch.linalg.vector_norm(corrected - Bm)) / size if size > 0 else 0.0}
    for word, B_ in (("before", Bm), ("bias", corrected)):
        left, right = torch.cat([ideal[0], -B_], dim=1), torch.cat([ideal[1], Am])
        found[word] = float(norm(left, right)) / whole if whole > 0 else 0.0
        product = float(norm(B_, Am))
        inner = float(((ideal[0].T @ B_) * (ideal[1] @ Am.T)).sum())
        found[f"cosine_{word}"] = inner / (whole * product) if whole * product > 0 else 1.0
    return found
