"""Teach attention where each named subject stands: an extra loss for scenes of several subjects.

After TokenCompose (Wang et al. 2024, arXiv 2312.03626, equations 3 and 4). The scenes are composed by us, so the box of
every subject is known. For subject k with box M_k and the words T_k that name it, let A_k(u) be the cross-attention
probability from place u to T_k, averaged over heads and words. The loss is

    mean_k (1 - sum_{u in M_k} A_k(u) / sum_u A_k(u))^2  -  mean_k mean_{u in M_k} log(A_k(u) / sum_j A_j(u))

The first term gathers each subject's attention in its box (the paper's token loss); the second makes every place in a
box look at its own subject rather than at another one (in place of the paper's pixel loss, whose target of 1 a softmax
over 40 words cannot reach). Only the middle and the upward blocks of the UNet are taught, as in
the paper; of tinydit the layers ``assets.build.flow.GROUNDED``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor
from transformers import CLIPTokenizer

from assets.build.data import Placed

MOST = 3
"""Subjects in a scene, at most."""


def name_spans(caption: str, names: Sequence[str]) -> list[tuple[int, int]]:
    """Return the character span of each name in the caption, as a whole word; ``(0, 0)`` where it is not found.

    >>> name_spans("a flat icon of a corn left of an unicorn", ["corn", "unicorn"])
    [(17, 21), (33, 40)]
    """
    padded, spans = f" {caption.replace(',', ' ')} ", []
    for name in names:
        at = padded.find(f" {name} ")
        spans.append((at, at + len(name)) if at >= 0 else (0, 0))
    return spans


def subject_tokens(
    tokenizer: CLIPTokenizer, captions: Sequence[str], names: Sequence[Sequence[str]], length: int
) -> np.ndarray:
    """Return which tokens name which subject: bool ``(captions, MOST, length)``."""
    coded = tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=length, return_offsets_mapping=True
    )
    marks = np.zeros((len(captions), MOST, length), bool)
    for row, (caption, subjects, offsets) in enumerate(zip(captions, names, coded["offset_mapping"], strict=True)):
        pieces = np.asarray(offsets)
        for k, (start, end) in enumerate(name_spans(caption, subjects)):
            marks[row, k] = (pieces[:, 0] < end) & (pieces[:, 1] > start)
    return marks


def boxes_of(scene: Mapping[str, Any]) -> np.ndarray:
    """Return the boxes (left, top, right, bottom; 0..1) of a scene record's subjects: float32 ``(MOST, 4)``."""
    out = np.zeros((MOST, 4), np.float32)
    for k, subject in enumerate(scene["subjects"]):
        out[k] = Placed(**subject).box(scene.get("aspect", 1))
    return out


def box_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return the share of each cell that a box covers: boxes ``(..., 4)`` -> ``(..., height * width)``."""

    def cover(low: Tensor, high: Tensor, cells: int) -> Tensor:
        edge = torch.arange(cells, device=low.device) / cells
        return (torch.minimum(high[..., None], edge + 1 / cells) - torch.maximum(low[..., None], edge)).clamp(min=0)

    across, down = cover(boxes[..., 0], boxes[..., 2], width), cover(boxes[..., 1], boxes[..., 3], height)
    return (down[..., :, None] * across[..., None, :]).flatten(-2) * height * width


class Recorder(AttnProcessor):
    """Plain attention that keeps the last probabilities ``(B, heads, places, words)`` in ``self.seen``."""

    seen: Tensor | None = None

    def __call__(self, attn: Attention, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Attend, and keep what was attended to."""
        scores = attn.get_attention_scores

        def keep(*given: Any) -> Tensor:
            probabilities = scores(*given)
            self.seen = probabilities.unflatten(0, (-1, attn.heads))
            return probabilities

        attn.get_attention_scores = keep  # type: ignore[method-assign]
        try:
            return super().__call__(attn, hidden_states, *rest, **named)  # type: ignore[no-any-return]
        finally:
            del attn.get_attention_scores


def record(unet: UNet2DConditionModel) -> list[Recorder]:
    """Let the cross-attention of the middle and upward blocks keep its probabilities; return what keeps them."""
    kept = []
    for name, module in unet.named_modules():
        if name.endswith("attn2") and not name.startswith("down"):
            kept.append(Recorder())
            module.set_processor(kept[-1])
    return kept


def grounding_loss(seen: Sequence[Tensor], marks: Tensor, boxes: Tensor, aspect: int = 1) -> Tensor:
    """Return the loss above, averaged over layers and over the scenes where at least two subjects are named.

    ``seen`` are attention maps ``(B, heads, places, words)``, ``aspect`` times as wide as high, ``marks`` ``(B, MOST,
    words)`` bool, ``boxes`` ``(B, MOST, 4)``. Without any such scene, or layer, it is 0.
    """
    named = marks.any(-1)
    named = named & (named.sum(-1, keepdim=True) >= 2)
    if not seen or not named.any():
        return torch.zeros((), device=marks.device)
    words = marks / marks.sum(-1, keepdim=True).clamp(min=1)
    total = torch.zeros((), device=marks.device)
    for layer in seen:
        side = round((layer.shape[2] / aspect) ** 0.5)
        maps = words.float() @ layer.float().mean(1).mT
        masks = box_masks(boxes, side, aspect * side)
        inside = (maps * masks.clamp(max=1)).sum(-1) / maps.sum(-1).clamp(min=1e-8)
        own = (maps * named[..., None]).clamp(min=1e-8)
        share = torch.log(own / own.sum(1, keepdim=True))
        told = (share * masks).sum(-1) / masks.sum(-1).clamp(min=1e-8)
        total = total + ((1 - inside).square() - told)[named].mean()
    return total / len(seen)
