"""BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language Models, arXiv
2408.04556 (formulas of the final version).

Z_F (N, D) are the logits of the model in training, Z_P those of the untouched pre-trained model on the same inputs, one
row per sample (classification, NLU) or per valid token (text, NLG). Loss = task loss + l1 CR + l2 DR + l3 SR:

    CR  T^2 KL(softmax(Z_P / T) || softmax(Z_F / T)), mean over rows
    DR  NLU: (1/D) sum_{i != j} C_ij^2, C the covariance of Z_F;   NLG: minus the mean entropy of the K likeliest tokens
    SR  minus the sum of the k largest singular values of Z_F over its nuclear (NLU) or Frobenius norm (NLG)

Weights (l1, l2, l3): NLU 0.15, 0.03, 0.03, k 5; NLG 0.025, 0.005, 0.005, k 10, K 20. l1 falls along a cosine to a
tenth; l2 and l3 begin after 20 % of the steps and rise over 5 %. ``2024`` in names is the authors' first code. The
paper starts from PiSSA. DR and SR are defined per forward pass (they do not add up over micro-batches). Trained: A and
B. Stored: an ordinary LoRA.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.low_rank import truncated_svd
from adapters.options import Option, Rule, Training
from adapters.plugin import Answers, Handles, Need, Outputs, Plugin

METHOD = Method(
    name="ba",
    title="BA-LoRA",
    summary="Keeps outputs close to the base model's, diverse and concentrated, against inherited bias and noise; "
    "costs one more forward pass. For models with logits.",
    stage="learn",
    makes="ordinary LoRA",
    paper="BA-LoRA, arXiv 2408.04556",
    entry="adapters.learn.ba_lora:BiasPlugin",
    training=Training(
        key="reg",
        options=(
            Option(
                "ba_task",
                "auto",
                choices=("auto", "nlu", "nlg"),
                help="ba: nlg for text, nlu for classification; auto decides by the shape of the logits.",
            ),
            Option(
                "ba_l1", None, type="float", ge=0, help="ba: weight of consistency with the base; empty = the paper's."
            ),
            Option("ba_l2", None, type="float", ge=0, help="ba: weight of diversity; empty = the paper's."),
            Option("ba_l3", None, type="float", ge=0, help="ba: weight of concentration; empty = the paper's."),
            Option(
                "ba_k",
                None,
                type="int",
                ge=1,
                help="ba: how many singular values count as large; empty = the paper's.",
            ),
            Option("ba_topk", 20, ge=2, help="ba, text: diversity among this many likeliest tokens."),
            Option("ba_temp", 2.0, gt=0, help="ba: temperature of the consistency term."),
            Option(
                "ba_norm",
                "auto",
                choices=("auto", "frobenius", "nuclear"),
                help="ba: the norm that the largest singular values are divided by.",
            ),
            Option(
                "ba_schedule",
                "paper",
                choices=("paper", "constant"),
                help="ba: paper lets consistency fall and the others begin after a fifth of the run.",
            ),
            Option(
                "ba_version",
                "2026",
                choices=("2026", "2024"),
                help="ba: formulas of the final paper or of the authors' first code.",
            ),
        ),
        refused=(
            Rule(
                "fused_loss",
                "BA-LoRA needs logits, which a fused loss never computes: switch the fused loss off",
            ),
        ),
        warned=(Rule("init != 'pissa'", "BA-LoRA's paper starts from PiSSA: set init to 'pissa' to follow it."),),
    ),
)

CHUNK = 4096
"""Rows per chunk of the consistency term, which bounds its memory."""

EXACT = 4096
"""Singular values are exact where the smaller side has at most this many rows or columns."""


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
    """Mask (batch, length) of the logits that predict a valid label (not -100); ``shifted``: logit t, label t + 1."""
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
            f"The model in training has {zf.shape[-1]} logits, the base {zp.shape[-1]}: BA-LoRA needs equally many."
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
        raise InputError("BA-LoRA for classification compares samples: use batches of at least 2, one row each.")
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
    """CR of the first code: NLU mean squared error of normalised logits, NLG KL summed over positions, per sequence."""
    if task == "nlu":
        return F.mse_loss(F.normalize(zf.float(), dim=-1), F.normalize(zp.float(), dim=-1))
    log_q, log_p = F.log_softmax(zf.float(), -1), F.log_softmax(zp.float(), -1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / zf.shape[0]


def diversity_2024(zf: Tensor, task: str) -> Tensor:
    """DR of the first code: unchanged for NLU; for NLG minus the mean entropy over the whole vocabulary."""
    return diversity_covariance(zf) if task == "nlu" else diversity_topk(zf.flatten(0, -2), zf.shape[-1])


class BiasPlugin(Plugin):
    """BA-LoRA's three terms on the logits."""

    name = "ba"

    def configure(self, config: Any) -> None:
        self.config, self.step, self.total, self.seed = config, 0, 0, int(getattr(config, "seed", 0))
        self._warned: set[str] = set()

    def needs(self) -> frozenset[Need]:
        return frozenset({"logits", "reference"})

    def after_inject(self, handles: Handles) -> None:
        self.total = handles.steps
        if self.config.ba_schedule == "paper" and self.config.ba_version == "2026":
            weights_at(PAPER["nlg"], 0, self.total)  # refuses an unknown number of steps now

    def step_begin(self, step: int) -> None:
        self.step = step

    def loss(self, loss: Tensor, outputs: Outputs | Answers) -> tuple[Tensor, dict[str, float]]:
        if not isinstance(outputs, Answers):
            raise InputError("BA-LoRA needs a model with logits: for pictures use prior_preservation instead.")
        config, logits = self.config, outputs.logits
        task = ("nlg" if logits.ndim == 3 else "nlu") if config.ba_task == "auto" else config.ba_task
        if task == "nlu" and logits.ndim != 2:
            raise InputError("BA-LoRA for classification needs one row of logits per sample: set ba_task to 'nlg'.")
        terms = self._terms(task, outputs)
        logs: dict[str, float] = {}
        for name, (weight, value) in terms.items():
            loss = loss + outputs.share * weight * value
            logs[f"ba_{name}"] = measured = float(value.detach())
            logs[f"ba_{name}_weighted"] = weight * measured
        return loss, logs

    def _weights(self, task: str) -> Weights:
        config = self.config
        first = config.ba_version == "2024"
        base = FIRST_CODE if first else PAPER[task]
        chosen = Weights(
            base.l1 if config.ba_l1 is None else config.ba_l1,
            base.l2 if config.ba_l2 is None else config.ba_l2,
            base.l3 if config.ba_l3 is None else config.ba_l3,
            config.ba_k or base.k,
        )
        return weights_at(chosen, self.step, self.total, "constant" if first else config.ba_schedule)

    def _terms(self, task: str, outputs: Answers) -> dict[str, tuple[float, Tensor]]:
        """Name -> (weight, value) of the terms whose weight is above 0."""
        config, weights, first = self.config, self._weights(task), self.config.ba_version == "2024"
        mask: Any = ...
        if task == "nlg":
            mask = valid_rows(outputs.labels, outputs.shifted)
            if not bool(mask.any()):
                self._warn("a batch has no valid tokens: BA-LoRA skips it")
                return {}
        rows = outputs.logits[mask]
        found: dict[str, tuple[float, Tensor]] = {}
        if weights.l1 > 0:
            teacher = outputs.reference()
            if teacher.shape != outputs.logits.shape:
                raise InputError("The base's logits differ in shape from the trained model's: use the same vocabulary.")
            value = (
                consistency_2024(outputs.logits, teacher, task)
                if first
                else consistency(rows, teacher[mask], config.ba_temp)
            )
            found["consistency"] = weights.l1, value
        if weights.l2 > 0 and task == "nlu" and rows.shape[0] < 2:
            self._warn("a batch of one sample has no covariance: BA-LoRA skips its diversity term")
        elif weights.l2 > 0:
            if first:
                value = diversity_2024(outputs.logits if task == "nlg" else rows, task)
            elif task == "nlu":
                value = diversity_covariance(rows)
            else:
                value = diversity_topk(rows, config.ba_topk)
            found["diversity"] = weights.l2, value
        if weights.l3 > 0:
            if weights.k > min(rows.shape):
                self._warn(f"ba_k {weights.k} is reduced to {min(rows.shape)}, the number of singular values")
            kind = config.ba_norm
            if kind == "auto":
                kind = "nuclear" if task == "nlu" or first else "frobenius"
            found["spectral"] = weights.l3, spectral(rows, weights.k, kind, self.seed + self.step)
        return found

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=3)
