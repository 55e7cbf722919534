"""From logits to tokens and from tokens to text, one request at a time, as they come."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapters.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen.

    Attributes:
        max_tokens: most new tokens.
        temperature: 0 always takes the likeliest token; higher is more varied.
        top_p: sample only from the likeliest tokens that together have this probability.
        top_k: sample only from so many likeliest tokens; 0 = all.
        repetition_penalty: above 1, logits of tokens that occurred (prompt or answer) are divided by it if positive,
            multiplied if negative.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens that were generated: once, and as
            often as they occurred.
        logit_bias: token -> number added to its logit.
        seed: the same seed gives the same answer, whatever else is answered at the same time; None = any.
        stop: texts at which the answer ends; they are not part of it.
        ignore_eos: go on after the end token, up to ``max_tokens`` (for measurements).
        logprobs: likeliest tokens to report at each position; None = no log-probabilities at all.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.95
    top_k: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = 0
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def check(self) -> None:
        """Raise :class:`InputError` for values without meaning."""
        for name, lowest, highest in (
            ("max_tokens", 1, 2**31), ("temperature", 0, 100), ("top_k", 0, 2**31), ("repetition_penalty", 0.01, 100),
            ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2),
        ):  # fmt: skip
            if not lowest <= getattr(self, name) <= highest:
                raise InputError(f"{name} must be from {lowest} to {highest}, got {getattr(self, name)}.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if any(not text for text in self.stop):
            raise InputError("A stop text is empty: leave it out.")
        if not all(math.isfinite(bias) for bias in self.logit_bias.values()):
            raise InputError("A number of logit_bias is not finite.")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise InputError(f"Log-probabilities are given for up to 20 tokens, not {self.logprobs}.")

    @property
    def plain(self) -> bool:
        """Whether the token is the one with the largest logit, as it stands."""
        penalised = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias
        return self.temperature == 0 and not penalised


def generator(seed: int | None) -> torch.Generator:
    """A random generator of one request, on the CPU, so that devices agree."""
    made = torch.Generator()
    made.manual_seed(torch.seed() % 2**63 if seed is None else seed % 2**63)
    return made


def choose(logits: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int], random: Any) -> int:
    """The next token from its logits (vocabulary,)."""
    if sampling.plain:
        return int(logits.argmax())
    scores = penalised(logits.float().cpu(), sampling, prompt, answer)
    if sampling.temperature == 0:
        return int(scores.argmax())
    probabilities = nucleus(scores / sampling.temperature, sampling.top_p, sampling.top_k)
    return int(torch.multinomial(probabilities, 1, generator=random))


def penalised(scores: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """The logits after bias and penalties, (vocabulary,)."""
    scores = scores.clone()
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *answer}))
        found = scores[seen]
        scores[seen] = torch.where(found < 0, found * sampling.repetition_penalty, found / sampling.repetition_penalty)
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        counted = Counter(answer)
        counts = torch.tensor(list(counted.values()), dtype=scores.dtype)
        scores[list(counted)] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return scores


def nucleus(scores: Tensor, top_p: float, top_k: int) -> Tensor:
    """Probabilities with those outside the nucleus set to 0 and the rest summing to 1, (vocabulary,)."""
    if top_k:
        least = scores.topk(min(top_k, scores.numel())).values[-1]
        scores = scores.masked_fill(scores < least, float("-inf"))
    probabilities = scores.softmax(-1)
    if top_p < 1:
        ordered, places = probabilities.sort(descending=True)
        beyond = ordered.cumsum(0) - ordered >= top_p  # the likeliest one always stays
        probabilities[places[beyond]] = 0
        probabilities /= probabilities.sum()
    return probabilities


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability under the model itself, and those of the likeliest tokens."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def logprobs(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """Log-probabilities from the logits (vocabulary,) before penalties and temperature."""
    found = logits.float().log_softmax(-1)
    best = found.topk(count) if count else None
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best is not None else ()
    return TokenLogprob(token, float(found[token]), top)


class TextStream:
    """The text of tokens as they come; never a broken character, and no text that may be the start of a stop text.

    Attributes:
        text: all text given out so far.
        stopped: whether a stop text was met; nothing comes after it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.text, self.stopped = "", False
        self._tokens: list[int] = []
        self._begin = self._read = 0  # decoded from ``begin``, so that spaces between words are kept; given to ``read``
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain after one more token."""
        self._tokens.append(token)
        return self._release(self._fresh(final=False), final=False)

    def finish(self) -> str:
        """The rest, when no token follows."""
        return self._release(self._fresh(final=True), final=True)

    def _fresh(self, final: bool) -> str:
        before = self._decode(self._tokens[self._begin : self._read])
        now = self._decode(self._tokens[self._begin :])
        if len(now) <= len(before) or (now.endswith("�") and not final):  # in the middle of a character
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""

    def _release(self, fresh: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += fresh
        met = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if met:
            self.stopped, ready, self._held = True, self._held[: min(met)], ""
        else:
            kept = 0 if final else max((_begun(self._held, stop) for stop in self.stops), default=0)
            ready, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self.text += ready
        return ready


def _begun(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins."""
    return next((size for size in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:size])), 0)
