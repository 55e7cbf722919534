"""LoRA-Enhanced Distillation on Guided Diffusion Models (arXiv 2312.06899): guidance without its second pass.

Classifier-free guidance with strength w calls the denoiser twice per step, with the prompt c and with the null prompt:

    eps_w = eps(z, t, null) + w (eps(z, t, c) - eps(z, t, null)),      w = 1: no guidance

(the convention of Imagen and diffusers; w' = w - 1 in Meng et al. and LCM). The student is the same frozen base with a
LoRA, y = W0 x + s B A x, trained so that its single conditional pass matches the teacher's two:

    L = mean | eps_S(z_t, t, c) - eps_w(z_t, t) |^2

The target is linear in the network's own output, so epsilon, v and flow velocity are treated alike. Trained: A and B;
teacher and student share one set of base weights. Stored: an ordinary LoRA. It halves the work per step.

Three ways to choose w: *fixed* (the paper); as the LoRA's *strength* (ours): eps_w - eps_c = (w - 1)(eps_c - eps_null)
is linear in w - 1, so the LoRA is trained with random w at s (w - 1) / (w_ref - 1), and later its weight selects w; as
an *embedding* (Meng et al., arXiv 2210.03142; see :mod:`pipelines.diffusion.distillation.embedding`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.catalogue import Method

METHOD = Method(
    name="guidance-distillation",
    title="LoRA-enhanced guidance distillation",
    summary="Distils classifier-free guidance into a LoRA on the same frozen base: one pass per step instead of two.",
    stage="learn",
    makes="ordinary LoRA",
    paper="LoRA-Enhanced Distillation on Guided Diffusion Models, arXiv 2312.06899",
    entry="pipelines.diffusion.distillation.guidance:guided",
)


def guided(without: Tensor, with_prompt: Tensor, w: float | Tensor, rescale: float = 0.0) -> Tensor:
    """The guided prediction eps_w, computed as eps_c + (w - 1)(eps_c - eps_null) so that w = 1 is exactly eps_c.

    Args:
        without, with_prompt: predictions (batch, ...) for the null prompt and for the prompts.
        w: one strength, or one per sample (batch,).
        rescale: share of the result that is rescaled to the standard deviation of ``with_prompt`` (Lin et al. 2023,
            arXiv 2305.08891, section 3.4), which prevents over-saturation at high w.
    """
    excess: float | Tensor = w - 1
    if isinstance(excess, Tensor):
        excess = excess.to(with_prompt).view(-1, *[1] * (with_prompt.ndim - 1))
    field = with_prompt + excess * (with_prompt - without)
    if not rescale:
        return field
    places = tuple(range(1, field.ndim))
    scaled = field * (with_prompt.std(dim=places, keepdim=True) / field.std(dim=places, keepdim=True))
    return rescale * scaled + (1 - rescale) * field


def within(w: Tensor, level: Tensor, low: float, high: float) -> Tensor:
    """``w`` (batch,) where the noise level (batch,) is in [low, high], and 1 (no guidance) elsewhere.

    Guidance in an interval: Kynkäänniemi et al. 2024 (arXiv 2404.07724).
    """
    return torch.where((level >= low) & (level <= high), w, torch.ones_like(w))


def strength(w: float | Tensor, w_ref: float) -> float | Tensor:
    """LoRA strength (w - 1) / (w_ref - 1) that corresponds to guidance ``w``: 0 at w = 1, 1 at w_ref."""
    return (w - 1) / (w_ref - 1)


def guidance_at(weight: float, w_ref: float) -> float:
    """The guidance that corresponds to a LoRA strength; the inverse of :func:`strength`."""
    return 1 + weight * (w_ref - 1)
