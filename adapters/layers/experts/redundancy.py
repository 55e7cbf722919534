"""How different the experts of each layer are: MoLA's measure of redundancy (arXiv 2402.08562, section 4.3).

The distance of two experts is |s B_1 A_1 - s B_2 A_2|_F, from Gram matrices of their factors and never of the matrices
themselves, since A and B alone say nothing: many pairs of them have one product.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from adapters.layers.experts.model import expert_layers


@torch.no_grad()
def distances(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """(N, N) Frobenius distances of the updates s B_e A_e, for A (N, r, in) and B (N, out, r)."""
    A, B = A.double(), B.double()
    experts, rank = A.shape[:2]
    right = A.reshape(experts * rank, -1)
    left = B.transpose(1, 2).reshape(experts * rank, -1)
    # <B_i A_i, B_j A_j> of each two experts
    products = ((left @ left.T) * (right @ right.T)).view(experts, rank, experts, rank).sum((1, 3))
    own = products.diagonal()
    return scale * (own[:, None] + own[None, :] - 2 * products).clamp_min(0).sqrt()


def redundancy(model: nn.Module, adapter: str = "default", only: str = "att") -> Mapping[int, float]:
    """Number of a layer -> mean distance between its experts, over its modules whose path contains ``only``.

    Small distances mean redundant experts. Layers without such a module are left out.
    """
    found: dict[int, list[float]] = {}
    for path, layer in expert_layers(model).items():
        place = layer.places.get(adapter)
        if place is None or place.layer is None or place.experts < 2 or only not in path:
            continue
        for role in place.roles:
            factors = layer.factors(adapter, role)
            between = distances(factors.A, factors.B, factors.scale)
            pairs = [float(between[i, j]) for i, j in combinations(range(place.experts), 2)]
            found.setdefault(place.layer, []).append(sum(pairs) / len(pairs))
    return {number: sum(values) / len(values) for number, values in sorted(found.items())}
