"""How many pages running requests can ever need at once: admission that never has to preempt (arXiv 2311.03285).

Request i holds c_i tokens, may generate m_i more, and takes w_i pages per token. If all decode in lock-step, it holds
c_i + t tokens after t steps, until t = m_i. Sorted by m, descending, with w = 1 the most at any time is

    max_j ( m_j j + sum_{i <= j} c_i )

A request whose prompt is read in pieces starts to decode d_i steps late at most. Whenever it starts, it holds at most
c_i + min(t, m_i) tokens after t steps and is gone after d_i + m_i; so

    peak = max_j sum_{i : d_i + m_i >= t_j} w_i (c_i + min(t_j, m_i)),   t_j = d_j + m_j

bounds every course of events, and is the formula above where all d_i = 0 and w_i = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Demand:
    """What one request may need.

    Attributes:
        cached: c, tokens in the cache, with those of the prompt that are still to be read.
        remaining: m, most tokens that it can still generate.
        delay: d, most steps until it decodes.
        pages: w, pages per token.
    """

    cached: int
    remaining: int
    delay: int = 0
    pages: int = 1


def peak(demands: Sequence[Demand]) -> int:
    """The most pages that these requests can need at once."""
    if not demands:
        return 0
    c, m, d, w = (
        np.array([getattr(one, name) for one in demands]) for name in ("cached", "remaining", "delay", "pages")
    )
    ends = d + m
    held = w * (c + np.minimum(ends[:, None], m))  # row j: at the end of request j
    return int(np.where(ends >= ends[:, None], held, 0).sum(1).max())
