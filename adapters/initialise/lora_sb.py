"""LoRA-SB: Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning,
arXiv 2411.19557.

    y = W0 x + s B R A x,   trained: only R (r, r);   B (out, r) and A (r, in) frozen with orthonormal columns and rows

From the summed gradient g (out, in) of some batches, the first full AdamW step and its best rank-r approximation:

    D = -eta sign(g)  ~  U_r S_r V_r^T,   B = U_r,   A = V_r^T,   R = diag(S_r) / s

With B^T B = A A^T = I the update s B g_R A = s^2 B B^T g A^T A is the nearest one inside the fixed subspace, for any s.
The model starts one (projected) step away from the base; nothing is subtracted. Everything stays in fp32. Stored: an
ordinary LoRA with B R in place of B, exactly. ``linear=True`` uses D = -eta g instead (no sign), which is linear in g
and can therefore be averaged over clients.
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
    summary="Fixes A and B at the directions of the first full step and trains a small matrix between them: rank x "
    "rank parameters per layer.",
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
                help="lora_sb: step size of the first full step; empty = the first step's learning rate.",
            ),
        ),
        refused=(
            Rule(
                "use_dora",
                "lora_sb trains a small matrix between A and B, which DoRA does not support: switch use_dora off",
            ),
            Rule("freeze_a", "lora_sb freezes A and B already: switch freeze_a off"),
            Rule(
                "grad_rule == 'allora'",
                "allora scales the gradients of A and B, which lora_sb does not train: choose one of them",
            ),
            Rule(
                "loraplus_ratio != 1",
                "LoRA+ gives B its own learning rate, but lora_sb does not train B: set loraplus_ratio to 1",
            ),
        ),
        warned=(
            Rule(
                "",
                "LoRA-SB trains only rank x rank parameters per layer: use a larger rank and a higher learning rate "
                "than for LoRA.",
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
        eta: size of the first step; in the authors' code, the learning rate of the first optimiser step.
        linear: use the gradient itself instead of its sign.

    Raises:
        InputError: the rank is larger than the layer, the gradient is zero or not finite, or eta is not above 0.
    """
    if rank > min(g.shape):
        raise InputError(
            f"Rank {rank} is larger than this layer ({g.shape[0]} x {g.shape[1]}): use at most {min(g.shape)}."
        )
    if not eta > 0:
        raise InputError(f"LoRA-SB's first step must be larger than 0, got {eta}: set sb_step.")
    if not bool(torch.isfinite(g).all()) or not bool(g.any()):
        raise InputError("The gradient of this layer is zero or not finite: LoRA-SB cannot start from it.")
    step = -eta * (g if linear else g.sign())
    U, S, Vh = truncated_svd(step, rank, seed)
    return Vh.contiguous(), U.contiguous(), torch.diag(S / scale)


def start(layer: StartLayer, sb_step: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and R of one layer."""
    return sb_factors(layer.measured, layer.rank, layer.scale, sb_step or layer.rate, seed=layer.seed)


def from_lora(A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """A (r, in), B (out, r) and R (r, r), A and B orthonormal, with s B R A equal to an ordinary LoRA's s B A."""
    left, R_left = torch.linalg.qr(B)
    right, R_right = torch.linalg.qr(A.T)
    return right.T.contiguous(), left, R_left @ R_right.T
