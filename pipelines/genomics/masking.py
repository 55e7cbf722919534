"""Masked k-mers: what a model learns from transcripts without labels (DNABERT, Ji et al. 2021).

Overlapping k-mers tell each other's letters, so spans are hidden: with a chosen centre c also c + d for d in
:func:`neighbours`. The probability of a centre is ``share / (1 + neighbours)``, which hides about ``share`` of the
tokens. Of the hidden tokens 80 % become [MASK], 10 % a random k-mer, 10 % stay.
"""

from __future__ import annotations

import torch

from pipelines.genomics.kmers import SPECIAL, Kmers, is_word

IGNORED = -100
"""Label of a token that is not learnt."""

_DNABERT = {3: (-1, 1), 4: (-1, 1, 2), 5: (-2, -1, 1, 2), 6: (-2, -1, 1, 2, 3)}


def neighbours(k: int, stride: int) -> tuple[int, ...]:
    """Distances of the tokens that are hidden with a centre: DNABERT's for stride 1 and k = 3 .. 6, else all that share
    a letter with it."""
    if stride == 1 and k in _DNABERT:
        return _DNABERT[k]
    reach = (k - 1) // stride
    return tuple(d for d in range(-reach, reach + 1) if d)


def mask_spans(
    ids: torch.Tensor, kmers: Kmers, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens with hidden spans, labels), both (batch, length) like ``ids``.

    At least one span of every row is hidden; special tokens never are.
    """
    around = neighbours(kmers.k, kmers.stride)
    special = torch.isin(ids, torch.tensor([kmers.number(word) for word in SPECIAL if word != "[UNK]"]))
    dice = torch.rand(ids.shape, generator=generator).masked_fill(special, 2.0)
    centres = (dice < share / (1 + len(around))) | ((dice == dice.min(dim=1, keepdim=True).values) & ~special)
    hidden = centres.clone()
    for d in around:
        hidden |= _shifted(centres, d)
    hidden &= ~special
    labels = ids.masked_fill(~hidden, IGNORED)
    kind = torch.rand(ids.shape, generator=generator)
    words = torch.tensor([n for n, word in enumerate(kmers.vocabulary) if is_word(word) and len(word) == kmers.k])
    strange = words[torch.randint(len(words), ids.shape, generator=generator)]
    shown = ids.masked_fill(hidden & (kind < 0.8), kmers.number("[MASK]"))
    return torch.where(hidden & (kind >= 0.8) & (kind < 0.9), strange, shown), labels


def _shifted(chosen: torch.Tensor, by: int) -> torch.Tensor:
    """``chosen`` (batch, length) moved right by ``by``, without wrapping."""
    moved = torch.zeros_like(chosen)
    if by > 0:
        moved[:, by:] = chosen[:, :-by]
    else:
        moved[:, :by] = chosen[:, -by:]
    return moved
