"""BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language Models, arXiv
2408.04556 (formulas of the final version).

Z_F (N, D) are the logits of the model in training, Z_P those of the untouched pre-trained model on the same inputs, one
row per sample (classification, NLU) or per valid token (text, NLG). Loss = task + l1 CR + l2 DR + l3 SR:

    CR  T^2 KL(softmax(Z_P / T) || softmax(Z_F / T)), mean over rows
    DR  NLU: (1/D) sum_{i != j} C_ij^2, C the covariance of Z_F;   NLG: minus the mean entropy of the K likeliest
    SR  minus the share of the k largest singular values of Z_F, of the nuclear (NLU) or Frobenius norm (NLG)

Weights (l1, l2, l3): NLU 0.15, 0.03, 0.03, k 5; NLG 0.025, 0.005, 0.005, k 10, K 20. l1 falls along a cosine to a
tenth, l2 and l3 begin after 20 % of the steps and rise over 5 %. ``2024`` in names is the authors' first code. The
paper starts from PiSSA. DR and SR are defined per forward pass (they do not add up over micro-batches). Trained: A and
B. Stored: an ordinary LoRA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.low_rank import truncated_svd

METHOD = Method(
    name="ba",
    title="BA-LoRA",
    summary="Keeps answers close to the base model's, diverse and concentrated, against inherited bias and noise; "
    "costs one more forward pass. For models with logits.",
    stage="learn",
    makes="ordinary LoRA",
    paper="BA-LoRA, arXiv 2408.04556",
    entry="adapters.learn.ba_lora:consistency",
)

CHUNK = 4096
"""Rows of which probabilities exist at a time in the consistency term."""

EXACT = 4096
"""Up to this many rows or columns, whichever are fewer, singular values are computed exactly."""


@dataclass(frozen=True)
class Weights:
    """Weights of the three terms, and k."""

    l1: float
    l2: float
    l3: float
    k: int


PAPER = {"nlu": Weights(0.15, 0.03, 0.03, 5), "nlg": Weights(0.025, 0.005, 0.005, 10)}
FIRST_CODE = Weights(1e-4, 3e-4, 1e-4, 3)


def weights_at(weights: Weights, step: int, total: int, schedule: str = "paper") -> Weights:
    """The weights at optimiser step ``step`` of ``total``.

    Raises:
        InputError: the paper's schedule without a number of steps.
    """
    if schedule == "constant":
        return weights
    if total < 1:
        raise InputError("BA-LoRA's schedule needs the number of steps: set max_steps, or ba_schedule to 'constant'.")
    t = min(1.0, step / total)
    falling = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t))
    rising = min(1.0, max(0.0, (t - 0.2) / 0.05))
    return Weights(weights.l1 * falling, weights.l2 * rising, weights.l3 * rising, weights.k)


def valid_rows(labels: Tensor, shifted: bool = True) -> Tensor:
    """Mask (batch, length) of the logits that predict a valid label; ``shifted``: logit t predicts label t + 1."""
    valid = labels != -100
    if not shifted:
        return valid
    return F.pad(valid[:, 1:], (0, 1), value=False)


def consistency(zf: Tensor, zp: Tensor, temperature: float = 2.0) -> Tensor:
    """CR: T^2 KL(teacher || student), mean over the rows of zf, zp (N, D); fp32.

    Raises:
        InputError: the two models have different vocabularies.
    """
    if zf.shape != zp.shape:
        raise InputError(
            f"The model in training has {zf.shape[-1]} logits, the base {zp.shape[-1]}: BA-LoRA compares equal ones."
        )
    total = zf.new_zeros((), dtype=torch.promote_types(zf.dtype, torch.float32))
    for student, teacher in zip(zf.split(CHUNK), zp.split(CHUNK), strict=True):
        log_p = F.log_softmax(teacher.to(total.dtype) / temperature, -1)
        log_q = F.log_softmax(student.to(total.dtype) / temperature, -1)
        total = total + F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return temperature**2 * total / zf.shape[0]


def diversity_covariance(zf: Tensor) -> Tensor:
    """DR for classes: (1/D) sum_{i != j} C_ij^2 over the logits (N, D).

    Raises:
        InputError: fewer than two samples.
    """
    if zf.ndim != 2 or zf.shape[0] < 2:
        raise InputError("BA-LoRA for classification compares samples: a batch needs at least 2, of one row each.")
    z = zf.to(torch.promote_types(zf.dtype, torch.float32))
    z = z - z.mean(0)
    squared = (z.T @ z / (z.shape[0] - 1)).square()
    return (squared.sum() - squared.diagonal().sum()) / z.shape[1]


def diversity_topk(zf: Tensor, top: int = 20) -> Tensor:
    """DR for text: minus the mean entropy over the ``top`` largest logits of each row, in [-ln top, 0]."""
    z = zf.to(torch.promote_types(zf.dtype, torch.float32)).topk(min(top, zf.shape[-1])).values
    log_p = F.log_softmax(z, -1)
    return (log_p.exp() * log_p).sum(-1).mean()


def spectral(zf: Tensor, k: int, normaliser: str = "frobenius", seed: int = 0) -> Tensor:
    """SR: minus sum of the k largest singular values of zf (N, D) over its nuclear or Frobenius norm.

    Zero (no gradient) for fewer than two rows or a norm below 1e-8. Singular vectors u come from the smaller Gram
    matrix and are constants: |u^T Z| has the singular value and its gradient.
    """
    z = zf.to(torch.promote_types(zf.dtype, torch.float32))
    if z.shape[0] < 2:
        return z.new_zeros(())
    k = min(k, *z.shape)
    if normaliser == "nuclear":
        values = torch.linalg.svdvals(z)
        size, largest = values.sum(), values[:k].sum()
    else:
        size, largest = torch.linalg.matrix_norm(z), _largest(z, k, seed)
    return z.new_zeros(()) if float(size.detach()) < 1e-8 else -largest / size


def _largest(z: Tensor, k: int, seed: int) -> Tensor:
    """Sum of the k largest singular values of z (N, D)."""
    z = z if z.shape[0] <= z.shape[1] else z.T
    with torch.no_grad():
        if z.shape[0] <= EXACT:
            U = torch.linalg.eigh(z @ z.T)[1][:, -k:]
        else:
            U = truncated_svd(z, k, seed, exact_below=EXACT)[0]
    return torch.linalg.vector_norm(U.T @ z, dim=1).sum()


def consistency_2024(zf: Tensor, zp: Tensor, task: str) -> Tensor:
    """CR of the first code: NLU mean squared distance of normalised logits, NLG KL over all positions per sequence."""
    if task == "nlu":
        return F.mse_loss(F.normalize(zf.float(), dim=-1), F.normalize(zp.float(), dim=-1))
    log_q, log_p = F.log_softmax(zf.float(), -1), F.log_softmax(zp.float(), -1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / zf.shape[0]


def diversity_2024(zf: Tensor, task: str) -> Tensor:
    """DR of the first code: as now for NLU, minus the entropy of the whole vocabulary over all positions for NLG."""
    return diversity_covariance(zf) if task == "nlu" else diversity_topk(zf.flatten(0, -2), zf.shape[-1])
