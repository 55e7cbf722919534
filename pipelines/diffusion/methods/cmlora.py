"""CMLoRA: one adapter dominates each step; most predictions of the others are reused.

"Cached Multi-LoRA Composition for Multi-Concept Image Generation" (arXiv 2502.04923), implemented from its description,
with two approximations (below). Adapter d leads:

    eps = sum_i w_i eps_i,    w_d = a / (a + N - 1),   w_i = 1 / (a + N - 1),   a = N - 1/2

The adapters lead in turns of tau steps, in the order of high-frequency content: the share of |F(eps_i - eps_0)|^2
beyond 0.4 of the highest frequency, measured once at the first step (the authors' code goes by words in the file's
name). All predictions are made every 2 steps in the first 3/8 of the steps, every 3 until 7/8, and every 2 after; in
between only the leader predicts, and the others keep their difference from it:

    eps ~ eps_d(t) + sum_i w_i (eps_i(t') - eps_d(t'))        t' the last step at which all were predicted

Approximations: the paper caches deep features inside the network, this caches predictions; and this ranks by measured
differences of predictions. A step that predicts all is exact; N = 1 is plain LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adapters.catalogue import Method
from pipelines.diffusion.denoise import Denoising
from pipelines.diffusion.methods.step import Step, Strengths
from pipelines.diffusion.methods.switch import turn

METHOD = Method(
    name="cmlora",
    title="Cached Multi-LoRA",
    summary="Composite with a leading adapter that changes in turns; between refreshes only it predicts (approximate).",
    stage="compose",
    makes="picture",
    paper="Cached Multi-LoRA Composition for Multi-Concept Image Generation, arXiv 2502.04923 (approximated)",
    entry="pipelines.diffusion.methods.cmlora:steps",
    properties={"position": 10, "turns": True},
)

CUTOFF = 0.4
"""Radial frequency, as a share of the highest, from which content counts as high-frequency."""


@dataclass(frozen=True)
class LeadStep(Step):
    """A step with a leader.

    Attributes:
        place: position of the leader in the order of leadership.
        refresh: all adapters predict; otherwise only the leader.
    """

    place: int = 0
    refresh: bool = True

    @property
    def forwards(self) -> int:
        return max(1, len(self.active)) if self.refresh else 1


class Run(Denoising):
    """Caches the predictions of the last refresh, one set per call of the denoiser in a step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._order: list[int] | None = None
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._seen = (-1, 0)
        self._base: Tensor | None = None

    def predictions(self, step: Step) -> list[int]:
        everything = super().predictions(step)
        assert isinstance(step, LeadStep)
        if not everything or step.refresh or self._call not in self._kept:
            return everything
        return [self._leader(step)]

    def _before(self, module: Any, args: Any, kwargs: Any) -> Any:
        last, call = self._seen
        self._seen = (self.step, call + 1 if last == self.step else 0)
        return super()._before(module, args, kwargs)

    def _after(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if self._pending is not None and self._order is None:
            (given, named), _ = self._pending
            self.gates.off()
            self._base = module.forward(*given, **named)[0]
        return super()._after(module, args, kwargs, output)

    def reduce(self, predictions: Tensor) -> Tensor:
        step = self.steps[min(self.step, len(self.steps) - 1)]
        assert isinstance(step, LeadStep)
        count = len(step.active)
        if self._order is None and self._base is not None:
            parts = predictions.view(count, -1, *predictions.shape[1:])
            high = [high_frequency(part - self._base) for part in parts]
            self._order = sorted(range(count), key=lambda i: -high[i])
            self._base = None
        leader = self._leader(step)
        factors = torch.tensor(shares(count, leader), device=predictions.device).to(predictions)
        if self._call in self._kept and predictions.shape[0] * count == self._kept[self._call].shape[0]:
            kept = self._kept[self._call].view(count, -1, *predictions.shape[1:])
            return predictions + torch.einsum("n,n...->...", factors, kept - kept[leader])
        self._kept[self._call] = predictions.clone()
        return torch.einsum("n,n...->...", factors, predictions.view(count, -1, *predictions.shape[1:]))

    @property
    def _call(self) -> tuple[int, int]:
        return self._seen[1], self.output

    def _leader(self, step: LeadStep) -> int:
        """Index of the leading prediction among those of the step."""
        count = len(step.active)
        order = self._order if self._order is not None and len(self._order) == count else list(range(count))
        return order[step.place % count]


def steps(strengths: Strengths, tau: int = 1) -> list[Step]:
    """Steps with all predictions at a refresh, and only the leader's in between."""
    made: list[LeadStep] = []
    last = -1
    for k, row in enumerate(strengths):
        same = k > 0 and made[-1].active == Step(row).active
        refresh = last < 0 or not same or k - last >= interval(k / len(strengths))
        last = k if refresh else last
        made.append(LeadStep(row, separate=True, place=turn(k, len(row), tau) if row else 0, refresh=refresh))
    return [replace(step) for step in made]


def interval(progress: float) -> int:
    """Steps between refreshes at ``progress`` in [0, 1)."""
    return 3 if 0.375 <= progress < 0.875 else 2


def shares(count: int, leader: int) -> list[float]:
    """w_i; they sum to 1."""
    alpha = count - 0.5
    return [(alpha if i == leader else 1.0) / (alpha + count - 1) for i in range(count)]


def high_frequency(difference: Tensor) -> float:
    """High-frequency share of the energy of (batch, channels, height, width), or of (batch, tokens, width)."""
    field = difference.float()
    if field.ndim < 4:  # tokens of a transformer: frequencies along the sequence
        field = field.transpose(1, 2)[:, :, None, :]
    power = torch.fft.fft2(field).abs().square()
    rows = torch.fft.fftfreq(field.shape[-2], device=field.device)[:, None]
    columns = torch.fft.fftfreq(field.shape[-1], device=field.device)[None, :]
    radius = (rows.square() + columns.square()).sqrt()
    total = float(power.sum())
    return float(power[..., radius >= CUTOFF * float(radius.max())].sum()) / total if total > 0 else 0.0
