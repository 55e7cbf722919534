"""Test-time refinement of LoRA-Composer (arXiv 2403.11627): correct the latents so that every subject is in its region.

With M the cross-attention to one token of region i's subject, smoothed by a 3 x 3 Gaussian (sigma 0.5), G a Gaussian
over the region's box, S self-attention, k = 20 % of the region's cells (at least 1):

    enhancement  8 max(0, 1 - mean top k of (M G) in the region)                        per token   (gaussian: with G)
    fill         2 L1(column maxima of M in the region, the region's columns) + the same for rows          (fill_loss)
    region      10 mean top k of S from the region's cells to cells outside of it       per region       (region_loss)

    z <- z - lr_t dL/dz,   lr_t = rate sqrt(1 - t / (2 (T - 1)))

once before each step, until the loss grows (after the first tenth of the steps, at least 5) or half of the steps are
done. The constants are those of the authors' code, for T = 50 and Stable Diffusion 1.5.

Their code stops at step 25 of 50, or when the loss of its single picture grows after step 5; here these are shares of
the steps, and each picture of a batch stops separately. Their smoothing kernel is exp(-(x / 2 sigma)^2), as in
Attend-and-Excite, which is wider than the Gaussian with the sigma that both state. The correction is at most
``trust_region`` of the latents' norm (None = no limit, as in their code): on small models the constants destroy the
picture.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.diffusion.regions.region import RegionOptions
from pipelines.diffusion.regions.reinit import bounds

ENHANCE, FILL, REGION = 8.0, 2.0, 10.0
SHARE = 0.2
"""Share of a region's cells whose attention counts."""


def loss(
    cross: Tensor,
    self_: Tensor | None,
    tokens: Sequence[Sequence[int]],
    masks: Sequence[Tensor],
    options: RegionOptions,
) -> Tensor:
    """L of every sample (batch,).

    Args:
        cross: M (batch, regions, cells, tokens).
        self_: S (batch, cells, cells), for the region loss.
        tokens: positions of each region's subject in its text.
        masks: each region's hard mask (rows, columns).
        options: which terms are used.
    """
    total = cross.new_zeros(len(cross))
    for region, (positions, mask) in enumerate(zip(tokens, masks, strict=True)):
        inside = mask.bool().to(cross.device)
        count = max(1, int(SHARE * int(inside.sum())))
        hill = gaussian_hill(inside) if options.gaussian else inside.float()
        for position in positions:
            attention = smooth(cross[:, region, :, position].reshape(-1, *inside.shape))
            best = (attention * hill)[:, inside].topk(count, 1).values.mean(1)
            total = total + ENHANCE * (1 - best).clamp(min=0)
            if options.fill_loss:
                within = attention * inside
                for axis in (1, 2):
                    total = total + FILL * (within.amax(axis) - inside.any(axis - 1).float()).abs().mean(1)
        if options.region_loss and self_ is not None and not bool(inside.all()):
            flat = inside.flatten()
            outward = self_[:, flat][:, :, ~flat].flatten(1)
            total = total + REGION * outward.topk(min(count, outward.shape[1]), 1).values.mean(1)
    return total


def smooth(attention: Tensor) -> Tensor:
    """A 3 x 3 Gaussian of sigma 0.5 over (batch, rows, columns), reflected at the edges."""
    side = math.exp(-1 / (2 * 0.5**2))
    line = attention.new_tensor([side, 1.0, side])
    line = line / line.sum()
    padded = F.pad(attention[:, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, (line[:, None] * line[None, :])[None, None])[:, 0]


def gaussian_hill(inside: Tensor) -> Tensor:
    """exp(-(u^2 + v^2) / 2) over the region's bounding box, u and v from -1 to 1, scaled to maximum 1; 0 outside."""
    top, bottom, left, right = bounds(inside)
    rows = torch.linspace(-1, 1, bottom - top, device=inside.device)
    columns = torch.linspace(-1, 1, right - left, device=inside.device)
    hill = torch.exp(-(rows[:, None] ** 2 + columns[None, :] ** 2) / 2)
    made = torch.zeros(inside.shape, device=inside.device)
    made[top:bottom, left:right] = hill / hill.max()
    return made * inside


class Refinement:
    """The corrections of one call.

    Args:
        steps: number of steps of the call.
        options: step size, trust region and terms.
        measure: (latents, step) -> L (batch,), differentiable.
    """

    def __init__(self, steps: int, options: RegionOptions, measure: Callable[[Tensor, int], Tensor]) -> None:
        self.steps, self.options, self.measure = steps, options, measure
        self.losses: list[list[float]] = []
        self._active: Tensor | None = None
        self._before: Tensor | None = None

    def rate(self, step: int) -> float:
        """lr_t of a step."""
        progress = step / (self.steps - 1) if self.steps > 1 else 0.0
        return self.options.refine_rate * math.sqrt(1 - 0.5 * progress)

    def over(self, step: int) -> bool:
        """Whether no sample is corrected from this step on."""
        done = step >= math.ceil(self.steps / 2)
        return done or (self._active is not None and not bool(self._active.any()))

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        """The latents (batch, channels, h, w) corrected once, before step ``step``."""
        if self.over(step):
            return latents
        with torch.enable_grad():
            point = latents.detach().clone().requires_grad_(True)
            value = self.measure(point, step)
            scale = 1024.0 if latents.dtype == torch.float16 else 1.0  # small gradients vanish in fp16
            (gradient,) = torch.autograd.grad(value.sum() * scale, point)
        value, gradient = value.detach(), gradient.float() / scale
        if self._active is None:
            self._active = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
        sound = torch.isfinite(value) & torch.isfinite(gradient.flatten(1)).all(1)
        if not bool(sound[self._active].all()):
            warnings.warn("The refinement stops here: its loss or gradient is not finite.", stacklevel=2)
        self._active &= sound
        if self._before is not None and step >= max(5, 0.1 * self.steps):
            self._active &= ~(value > self._before)
        self._before = value
        self.losses.append(value.tolist())
        change = self.rate(step) * torch.nan_to_num(gradient)
        if self.options.trust_region is not None:
            change = limited(change, latents, self.options.trust_region)
        corrected = (latents.float() - change).to(latents.dtype)
        return torch.where(self._active[:, None, None, None], corrected, latents)


def limited(change: Tensor, latents: Tensor, share: float) -> Tensor:
    """``change`` (batch, ...) with its norm limited to ``share`` of the latents' norm, per sample."""
    axes = tuple(range(1, change.ndim))
    most = share * torch.linalg.vector_norm(latents.float(), dim=axes, keepdim=True)
    size = torch.linalg.vector_norm(change, dim=axes, keepdim=True)
    shorter: Tensor = change * (most / size.clamp(min=1e-12)).clamp(max=1)
    return shorter
