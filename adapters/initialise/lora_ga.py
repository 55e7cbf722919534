"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation, arXiv 2407.05000 (NeurIPS 2024).

G = dL/dW0 (out, in) on some batches, G = U S V^T, c = out^(1/4) / sqrt(gamma):

    A0 = c V^T[i],   B0 = c U[:, j]   with disjoint i, j of size r that cover the largest 2r directions

No singular values enter, so the result does not depend on the scale of the loss. One SGD step of rate l then changes
the effective weight by -l s^2 (G A0^T A0 + B0 B0^T G) = -l s^2 c^2 G_2r, the best rank-2r approximation of the full
step (Theorem 3.1). Trained: A and B; s B0 A0 is an offset, the base is not changed. Stored: an ordinary LoRA of rank
2r. Use rank-stabilised scaling s = alpha / sqrt(r), for which c is derived.

PEFT's ``lora_ga`` differs: it multiplies B by the gradient's singular values and applies c to B only, so its first step
is the rank-r truncation and depends on the scale of the loss. ``size="peft_0_21"`` reproduces it for comparison.
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
    name="lora_ga",
    title="LoRA-GA",
    summary="Starts so that the first step approximates that of full fine-tuning: fewer steps to the same loss.",
    stage="initialise",
    makes="ordinary LoRA",
    paper="LoRA-GA, arXiv 2407.05000",
    entry="adapters.initialise.lora_ga:start",
    training=Training(
        key="init",
        shared=("init_batches",),
        options=(
            Option(
                "ga_gamma",
                16.0,
                gt=0,
                help="lora_ga: A and B start at size out^(1/4) / sqrt(gamma); a smaller gamma starts larger.",
            ),
            Option(
                "ga_direction",
                "ArB2r",
                choices=("ArB2r", "A2rBr", "ArBr", "random"),
                help="lora_ga: which of the 2r singular directions of the gradient go to A and which to B.",
            ),
            Option(
                "ga_scale",
                "stable",
                choices=("stable", "unit", "gd", "weightS"),
                help="lora_ga: how the size of A and B at the start is chosen (stable is the paper's).",
            ),
            Option(
                "ga_norm_clip",
                False,
                help="lora_ga: shrink the start so that no entry of s B A exceeds the largest base weight.",
            ),
        ),
        warned=(
            Rule(
                "not use_rslora and grad_rule != 'allora'",
                "LoRA-GA's size of A and B is derived for rank-stabilised LoRA: switch use_rslora on.",
            ),
        ),
        looks_at="gradients",
        sets="offset",
    ),
)

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "unit", "gd", "weightS", "peft_0_21")


def ga_factors(
    G: Tensor,
    rank: int,
    scale: float,
    gamma: float = 16.0,
    direction: str = "ArB2r",
    size: str = "stable",
    W0: Tensor | None = None,
    norm_clip: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) from a gradient (out, in).

    Args:
        scale: s, the layer's forward factor.
        gamma: sets the ``stable`` size; smaller is larger.
        direction: ArB2r (A the first r directions, B the next r), A2rBr, ArBr (every second one) or random.
        size: stable (c), unit (1), gd (1 / s), weightS (mean of sqrt(sigma_i(W0) / s)), peft_0_21 (PEFT's).
        W0: the weight (out, in), for weightS and ``norm_clip``.
        norm_clip: shrink both factors until max |s B0 A0| <= max |W0| (the authors' option).

    Raises:
        InputError: 2 * rank exceeds the layer, the gradient is zero or not finite, or an option is unknown.
    """
    _check(G, rank, gamma, direction, size)
    U, S, Vh = truncated_svd(G, 2 * rank, seed)
    first, second = _split(rank, direction, seed)
    A0, B0 = Vh[first], U[:, second]
    if size == "peft_0_21":
        return A0, B0 * S[second] * _stable(G, gamma)
    factor = _factor(G, rank, scale, gamma, size, W0)
    A0, B0 = factor * A0, factor * B0
    if norm_clip and W0 is not None:
        ratio = float(W0.abs().max() / (scale * (B0 @ A0)).abs().max().clamp_min(torch.finfo(G.dtype).tiny))
        if ratio < 1:
            A0, B0 = A0 * ratio**0.5, B0 * ratio**0.5
    return A0, B0


def start(
    layer: StartLayer, ga_gamma: float, ga_direction: str, ga_scale: str, ga_norm_clip: bool
) -> tuple[Tensor, Tensor]:
    """A0 and B0 of one layer."""
    return ga_factors(
        layer.measured, layer.rank, layer.scale, ga_gamma, ga_direction, ga_scale, layer.W0, ga_norm_clip, layer.seed
    )


def _split(rank: int, direction: str, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of A's and of B's directions among the first 2r, disjoint."""
    order = torch.arange(2 * rank)
    if direction == "ArB2r":
        return order[:rank], order[rank:]
    if direction == "A2rBr":
        return order[rank:], order[:rank]
    if direction == "ArBr":
        return order[1::2], order[0::2]
    mixed = torch.randperm(2 * rank, generator=torch.Generator().manual_seed(seed))
    return mixed[:rank].sort().values, mixed[rank:].sort().values


def _stable(G: Tensor, gamma: float) -> float:
    return float(G.shape[0] ** 0.25 / gamma**0.5)


def _factor(G: Tensor, rank: int, scale: float, gamma: float, size: str, W0: Tensor | None) -> float:
    if size == "stable":
        return _stable(G, gamma)
    if size == "gd":
        return 1 / scale
    if size == "weightS":
        if W0 is None:
            raise InputError("LoRA-GA's size 'weightS' needs the weight.")
        return float((truncated_svd(W0, rank)[1] / scale).sqrt().mean())
    return 1.0


def _check(G: Tensor, rank: int, gamma: float, direction: str, size: str) -> None:
    if direction not in DIRECTIONS:
        raise InputError(f"LoRA-GA has no direction '{direction}': use one of {', '.join(DIRECTIONS)}.")
    if size not in SCALES:
        raise InputError(f"LoRA-GA has no size '{size}': use one of {', '.join(SCALES)}.")
    if not gamma > 0:
        raise InputError(f"LoRA-GA's gamma must be above 0, got {gamma}.")
    largest = min(G.shape) // 2
    if rank > largest:
        raise InputError(
            f"LoRA-GA takes 2 x rank directions of the gradient, but this layer is only {G.shape[0]} x {G.shape[1]}: "
            f"use a rank of at most {largest}."
        )
    if not bool(torch.isfinite(G).all()):
        raise InputError("The gradient of this layer is not finite: compute in fp32, or use other batches.")
    if not bool(G.any()):
        raise InputError("The gradient of this layer is zero everywhere: it does not take part in the loss.")
