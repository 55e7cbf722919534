"""Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA
Fine-Tuning, arXiv 2502.15436.

    y = W0 x + s B R A x,   R = sum_k p_k R_k

The orthonormal basis (B, A) and the first R come from the first full fine-tuning step (LoRA-SB,
:mod:`adapters.initialise.lora_sb`), computed once by the server from the *sum* of its clients' gradients and sent as
numbers; clients train and send R, r x r numbers per layer. The average is exact, sum_k p_k B R_k A = B (sum_k p_k R_k)
A. Stored: an ordinary LoRA with B R in place of B, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.federated.state import A, Aggregate, B, Options, R, State, mean
from adapters.initialise.lora_sb import sb_factors

METHOD = Method(
    name="fed-sb",
    title="Fed-SB",
    summary="A and B are fixed at the directions of the first full step, clients send a rank x rank matrix per layer: "
    "exact averages, the least traffic, little noise.",
    stage="federated",
    makes="ordinary LoRA",
    paper="Fed-SB, arXiv 2502.15436",
    entry="adapters.federated.fed_sb:aggregate",
    properties={"trains": "R", "linear": True},
)


def aggregate(replies: Sequence[State], weights: Sequence[float], options: Options) -> Aggregate:
    """The weighted mean of every R and of the tensors trained as a whole."""
    return Aggregate(mean(replies, weights, list(replies[0])))


def basis(
    gradients: Sequence[Mapping[str, Tensor]], rank: int, scales: Mapping[str, float], step: float, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The frozen factors, and the first R, of every layer.

    Args:
        gradients: of each client: layer -> dL/dW0 (out, in), summed over its calibration batches. Their sum is taken
            before the sign: the sign of a sum, not a sum of signs.
        scales: layer -> s.
        step: eta, the size of the first full step.

    Raises:
        InputError: no gradients, or a layer whose sum is zero or not finite, or smaller than ``rank`` (named).
    """
    if not gradients:
        raise InputError("Fed-SB needs the gradients of at least one client, or public calibration data.")
    fixed: dict[str, Tensor] = {}
    cores: dict[str, Tensor] = {}
    for name in gradients[0]:
        total = gradients[0][name].clone()
        for found in gradients[1:]:
            total += found[name]
        try:
            fixed[name + A], fixed[name + B], cores[name + R] = sb_factors(total, rank, scales[name], step, seed=seed)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    return fixed, cores
