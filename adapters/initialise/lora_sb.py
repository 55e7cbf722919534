"""LoRA-SB: Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning,
arXiv 2411.19557.

    y = W0 x + s B R A x,   trained: R (r, r) alone;   B (out, r) and A (r, in) frozen with orthonormal columns and rows

From the summed gradient g (out, in) of some batches, the first full AdamW step and its best rank-r approximation:

    D = -eta sign(g)  ~  U_r S_r V_r^T,   B = U_r,   A = V_r^T,   R = diag(S_r) / s

With B^T B = A A^T = I the update s B g_R A = s^2 B B^T g A^T A is the nearest one inside the fixed subspace, for any s.
The model starts one (projected) step away from the base; nothing is subtracted. Everything is kept in fp32. Stored: an
ordinary LoRA with B R in place of B, exactly. ``linear=True`` takes D = -eta g instead (no sign), which is linear in g
and therefore averages over clients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.initialise.start import StartLayer
from adapters.low_rank import truncated_svd
from adapters.options import Option, Rule, Training

METHOD = Method(
    name="lora_sb",
    title="LoRA-SB",
    summary="Fixes A and B at the first full step's directions and trains a small matrix between them: rank x rank "
    "numbers a layer.",
    stage="initialise",
    makes="ordinary LoRA",
    paper="LoRA-SB, arXiv 2411.19557",
    entry="adapters.initialise.lora_sb:start",
    training=Training(
        key="init",
        shared=("init_batches",),
        options=(
            Option(
                "sb_step",
                None,
                type="float",
                gt=0,
                help="lora_sb: length of the first full step it starts from; empty = the first step's learning rate.",
            ),
        ),
        refused=(
            Rule(
                "use_dora",
                "lora_sb trains a small matrix between A and B, which DoRA knows nothing of: switch use_dora off",
            ),
            Rule("freeze_a", "lora_sb freezes A and B already: switch freeze_a off"),
            Rule(
                "grad_rule == 'allora'",
                "allora scales the gradients of A and B, which lora_sb does not train: choose one of them",
            ),
            Rule(
                "loraplus_ratio != 1",
                "LoRA+ gives B a learning rate of its own, but lora_sb does not train B: set loraplus_ratio to 1",
            ),
        ),
        warned=(
            Rule(
                "",
                "LoRA-SB trains rank x rank numbers per layer: use a larger rank than for LoRA (and more learning "
                "rate).",
            ),
        ),
        looks_at="gradients",
        sets="core",
    ),
)


def sb_factors(
    g: Tensor, rank: int, scale: float, eta: float, linear: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A (r, in), B (out, r) and R (r, r) from a summed gradient (out, in).

    Args:
        scale: s, the layer's forward factor.
        eta: length of the first step, the learning rate of the first optimiser step in the authors' code.
        linear: without the sign.

    Raises:
        InputError: rank larger than the layer, a gradient that is zero or not finite, eta not above 0.
    """
    if rank > min(g.shape):
        raise InputError(
            f"Rank {rank} is larger than this layer ({g.shape[0]} x {g.shape[1]}): use at most {min(g.shape)}."
        )
    if not eta > 0:
        raise InputError(f"LoRA-SB's first step must be longer than 0, got {eta}.")
    if not bool(torch.isfinite(g).all()) or not bool(g.any()):
        raise InputError("The gradient of this layer is zero or not finite: LoRA-SB cannot start from it.")
    step = -eta * (g if linear else g.sign())
    U, S, Vh = truncated_svd(step, rank, seed)
    return Vh.contiguous(), U.contiguous(), torch.diag(S / scale)


def start(layer: StartLayer, sb_step: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and R of one layer."""
    return sb_factors(layer.measured, layer.rank, layer.scale, sb_step or layer.rate, seed=layer.seed)


def from_lora(A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """A (r, in), B (out, r), R (r, r) with orthonormal A, B and s B R A equal to an ordinary LoRA's s B A."""
    left, R_left = torch.linalg.qr(B)
    right, R_right = torch.linalg.qr(A.T)
    return right.T.contiguous(), left, R_left @ R_right.T
