"""What an update does to a model's alignment, measured on weights and hidden states; nothing here changes either.

Notation: W0 (out, in) the aligned base, update D = L R with L (out, r), R (r, in), alignment V = W_aligned -
W_unaligned (out, in), known if the base's unaligned twin is (the pre-trained model of a chat model). D is never formed:

    undo        u = -<V, D> / |V|^2              0 orthogonal to V, 1 one whole step back        <V, L R> = tr(R V^T L)
    cosine      <V, D> / (|V| |D|)
    inside      |U_k^T D|^2 / |D|^2              U_k: left singular vectors of V that hold 90 % of its energy
    Safe LoRA   <C D, D> / (|C D| |D|)           C = V V^T / |V|, arXiv 2405.16833

Safe LoRA's score is blind to the sign of D: D = -V undoes the alignment, lies inside its subspace, and scores as safe.
So u is always reported beside it.

Hidden states, after "Refusal in Language Models Is Mediated by a Single Direction", arXiv 2406.11717: per layer the
direction r = d / |d|, d = mean(h | harmful) - mean(h | harmless), at the last token before the answer. It is used to
measure, and is neither stored nor removed from anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.low_rank import compact_svd, norm

KEPT_ENERGY = 0.9
"""Share of |V|^2 in the alignment subspace."""


@dataclass(frozen=True)
class Screened:
    """One module.

    Attributes:
        relative: |D| / |W0|, Frobenius.
        spectral: |D|_2 / |W0|_2.
        stable_rank: |D|^2 / |D|_2^2; 0 without an update.
        undo, cosine, inside, safe_lora: see the module; None without an unaligned twin.
    """

    name: str
    relative: float
    spectral: float
    stable_rank: float
    undo: float | None = None
    cosine: float | None = None
    inside: float | None = None
    safe_lora: float | None = None


def screen(name: str, W0: Tensor, left: Tensor, right: Tensor, unaligned: Tensor | None = None) -> Screened:
    """Figures of one module.

    Args:
        W0: (out, in) of the aligned base.
        left, right: (out, r) and (r, in) of its update.
        unaligned: the same weight (out, in) of the unaligned twin.
    """
    L, R, W = left.double(), right.double(), W0.double()
    values = compact_svd(L, R)[1]
    size, largest = float(norm(L, R)), float(values[0]) if values.numel() else 0.0
    relative = _share(size, float(torch.linalg.vector_norm(W)))
    spectral = _share(largest, float(torch.linalg.matrix_norm(W, 2)))
    stable = (size / largest) ** 2 if largest > 0 else 0.0
    if unaligned is None:
        return Screened(name, relative, spectral, stable)
    V = W - unaligned.double()
    if not float(torch.linalg.vector_norm(V)) > 0:
        return Screened(name, relative, spectral, stable, 0.0, 0.0, 0.0, 0.0)
    U = subspace(V)
    return Screened(
        name, relative, spectral, stable, undo(V, L, R), cosine(V, L, R), inside(U, L, R), safe_lora_score(V, L, R)
    )


def dot(V: Tensor, left: Tensor, right: Tensor) -> float:
    """<V, L R>."""
    return float(((V.T @ left) * right.T).sum())


def undo(V: Tensor, left: Tensor, right: Tensor) -> float:
    """u = -<V, L R> / |V|^2."""
    return -dot(V, left, right) / float(V.square().sum())


def cosine(V: Tensor, left: Tensor, right: Tensor) -> float:
    """<V, L R> / (|V| |L R|); 0 without an update."""
    return _share(dot(V, left, right), float(torch.linalg.vector_norm(V) * norm(left, right)))


def subspace(V: Tensor, energy: float = KEPT_ENERGY) -> Tensor:
    """U_k (out, k): the fewest left singular vectors of V that hold ``energy`` of |V|^2."""
    U, S, _ = torch.linalg.svd(V.double(), full_matrices=False)
    held = S.square().cumsum(0) / S.square().sum()
    k = int((held < energy).sum()) + 1
    return U[:, :k]


def inside(U: Tensor, left: Tensor, right: Tensor) -> float:
    """|U^T L R|^2 / |L R|^2; 0 without an update."""
    return _share(float(norm(U.T @ left, right)), float(norm(left, right))) ** 2


def safe_lora_score(V: Tensor, left: Tensor, right: Tensor) -> float:
    """cos(C D, D) = |V^T D|^2 / (|V V^T D| |D|); 0 without an update."""
    pulled = V.T @ left
    within = float(norm(pulled, right)) ** 2
    return _share(within, float(norm(V @ pulled, right) * norm(left, right)))


# ------------------------------------------------------------------------------------------------ hidden states


@dataclass(frozen=True)
class Gap:
    """How far apart a layer keeps harmful and harmless requests, along the base's direction.

    Attributes:
        layer: 0 is the output of the first block.
        ratio: mean gap with the adapter / mean gap of the base.
        base_auc, adapter_auc: of telling them apart, on the half that the direction was not taken from.
    """

    layer: int
    ratio: float
    base_auc: float
    adapter_auc: float


def direction(harmful: Tensor, harmless: Tensor) -> Tensor:
    """r (layers, width) from hidden states (n, layers, width) and (m, layers, width), summed in fp64."""
    d = harmful.double().mean(0) - harmless.double().mean(0)
    return d / torch.linalg.vector_norm(d, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def gaps(base: tuple[Tensor, Tensor], adapted: tuple[Tensor, Tensor]) -> list[Gap]:
    """Per layer, from hidden states (harmful (n, layers, width), harmless (m, layers, width)) of both models.

    The direction comes from the even items of the base, the figures from the odd ones.
    """
    r = direction(base[0][::2], base[1][::2])
    before, after = (
        tuple(torch.einsum("nlw,lw->ln", states[1::2].double(), r) for states in pair) for pair in (base, adapted)
    )
    found = []
    for layer in range(r.shape[0]):
        (bad, good), (bad_after, good_after) = ((p[0][layer], p[1][layer]) for p in (before, after))
        ratio = _share(float(bad_after.mean() - good_after.mean()), float(bad.mean() - good.mean()))
        found.append(Gap(layer, ratio, auc(bad, good), auc(bad_after, good_after)))
    return found


def written_along(r: Tensor, W0: Tensor, left: Tensor, right: Tensor) -> float:
    """|r^T D| / |r^T W0| of a module (out, in) that writes the residual stream, r (out,)."""
    r = r.double()
    change = torch.linalg.vector_norm((r @ left.double()) @ right.double())
    return _share(float(change), float(torch.linalg.vector_norm(r @ W0.double())))


def auc(higher: Tensor, lower: Tensor) -> float:
    """Chance that an entry of ``higher`` (n,) exceeds one of ``lower`` (m,), ties half."""
    differences = higher[:, None] - lower[None, :]
    return float(((differences > 0).double() + 0.5 * (differences == 0).double()).mean())


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
