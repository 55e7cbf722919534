"""What is asked of the engine, and what it answers."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pipelines.language.tokens import Sampling, TextStream, TokenLogprob, generator

Reason = Literal["stop", "length", "cancelled", "late", "error"]
"""Why an answer ended: the end token or a stop text; max_tokens; the asker left; no first token in time; a failure."""


@dataclass(frozen=True)
class Piece:
    """What one step adds to an answer.

    Attributes:
        text: may be empty, while a character or a stop text is undecided.
        tokens: their log-probabilities, if they were asked for.
        reason: why the answer ended; None while it goes on.
        error: what failed.
    """

    text: str
    tokens: tuple[TokenLogprob, ...] = ()
    reason: Reason | None = None
    error: str = ""


_numbers = itertools.count(1)


@dataclass(eq=False)
class Request:
    """One answer to one prompt.

    Attributes:
        prompt: token numbers.
        adapter: key in the store; None = the base alone.
        mixture: name of a mixture of experts that acts; "" = none.
        label: name under which it is counted (metrics, fairness).
        sink: called with every piece, from the engine's thread.
        ends: tokens that end the answer.
        arrived: seconds, of :func:`time.monotonic`.
    """

    prompt: list[int]
    sampling: Sampling
    sink: Callable[[Piece], None]
    ends: frozenset[int] = frozenset()
    adapter: Any = None
    mixture: str = ""
    label: str = "base"
    arrived: float = field(default_factory=time.monotonic)
    number: int = field(default_factory=lambda: next(_numbers))
    answer: list[int] = field(default_factory=list)
    cached: int = 0
    pages: Any = None  # (2 L, capacity) page numbers
    shadow: Any = None  # the same for X-LoRA's first pass
    first_token: float | None = None
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.over = threading.Event()
        self.random = generator(self.sampling.seed)
        self.text: TextStream | None = None

    @property
    def done(self) -> bool:
        return self.over.is_set()

    @property
    def owner(self) -> tuple[str, int]:
        return ("kv", self.number)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.answer)

    @property
    def unread(self) -> int:
        """Tokens that are not in the cache yet."""
        return self.length - self.cached

    @property
    def remaining(self) -> int:
        """Most tokens that it may still generate."""
        return self.sampling.max_tokens - len(self.answer)

    @property
    def decoding(self) -> bool:
        """Whether only the last generated token is unread."""
        return bool(self.answer) and self.unread == 1

    def token(self, place: int) -> int:
        return self.prompt[place] if place < len(self.prompt) else self.answer[place - len(self.prompt)]

    def forget_cache(self) -> None:
        """Start again with what is known so far, after its pages were taken."""
        self.cached, self.pages, self.shadow = 0, None, None


def room(pages: Any, rows: int, length: int) -> Any:
    """The table of page numbers (rows, at least ``length``), grown to a power of two if it is too short."""
    if pages is not None and pages.shape[1] >= length:
        return pages
    made = np.zeros((rows, 1 << max(length - 1, 15).bit_length()), dtype=np.int64)
    if pages is not None:
        made[:, : pages.shape[1]] = pages
    return made
