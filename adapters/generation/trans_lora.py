"""Trans-LoRA: towards data-free Transferable Parameter Efficient Finetuning, arXiv 2405.17258 (NeurIPS 2024).

A LoRA theta_s of a model M_s is made again on another model M_t (other size, family or tokenizer) without the data D it
was trained on. Kept from D are a few seeds, and a discriminator phi, a LoRA of M_s trained while D was there to answer

    Yes for x in D,  No for x written by M_s itself from the seeds;      loss = cross entropy of that one token

Later (Algorithm 1) M_t writes inputs x from the seeds, and the student theta_t learns from what the teacher says to
those that look like the task's:

    D_syn = {(x, y)}:  x ~ M_t(seeds),  logit(Yes) - logit(No) > tau under M_s + phi,  y = argmax M_s + theta_s (x)
    theta_t = argmin sum over D_syn of the cross entropy of y's tokens under M_t + theta_t (hard labels)

Only text passes between the models. This module has what needs no model: the prompt that asks for one more input, the
parser that real and written inputs go through alike, the margin, and the rejection sampling. The models are in
:mod:`studio.transfer`. From memory of the paper, or ours: the wording, repeated inputs (exact, or by n-grams) left out,
the cap on tries, answers that do not fit the task's format left out, the test against chance, and soft labels for bases
that share a tokenizer: KL(M_s + theta_s || M_t + theta_t) at each token of y. Transfers in weight space (Cross-LoRA,
LoRA-X) need equal shapes and are not offered.
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Collection as Container
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from adapters.catalogue import Method
from adapters.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

METHOD = Method(
    name="trans-lora",
    title="Trans-LoRA",
    summary="Moves a language LoRA to another base without its data: the target writes inputs from a few seeds, a "
    "discriminator filters them, the source LoRA answers them.",
    stage="generation",
    makes="ordinary LoRA",
    paper="Trans-LoRA: towards data-free Transferable Parameter Efficient Finetuning, arXiv 2405.17258",
    entry="adapters.generation.trans_lora:Synthesis",
)

TaskFormat = Literal["free", "choice", "math", "code", "classification"]
Outcome = Literal["kept", "unreadable", "repeated", "rejected", "unanswered"]

HEAD = "### Example"
"""The line above each example of a prompt; what a model writes ends where it writes it again."""

QUESTION = "Is the following text an input of the task that you know? Answer {yes} or {no}.\n\n{input}"
"""What the discriminator is asked."""

_ASKED = (
    "These are inputs of one task:\n\n{examples}\n\nWrite one more input of this task, of the same form and different "
    "from these. Write the input alone, without an answer."
)
_CHOICE = re.compile(r"^\s*\(?[A-Z][).:]", re.MULTILINE)


# ------------------------------------------------------------------------------------------------ inputs and answers


def normalised(text: str) -> str:
    """The text without white space around it and at the ends of its lines; real and written inputs alike."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def few_shot(seeds: Sequence[str], chat: bool) -> str:
    """The prompt that asks for one more input.

    Args:
        seeds: inputs of the task, in the order shown.
        chat: a request to a chat model; otherwise a text that goes on with the next example.
    """
    shown = "\n\n".join(f"{HEAD}\n{seed}" for seed in seeds)
    return _ASKED.format(examples=shown) if chat else f"{shown}\n\n{HEAD}\n"


def read_input(written: str) -> str:
    """The input in what a model wrote after :func:`few_shot`; empty if there is none."""
    return normalised(written.strip().removeprefix(HEAD).partition(HEAD)[0])


@dataclass(frozen=True)
class TaskTemplate:
    """What inputs and answers of a task look like, and how they are asked.

    Attributes:
        form: "free" text; "choice" (two or more lettered options in the input, an answer that begins with a letter);
            "math" (an answer with a number); "code" (an answer that parses as Python); "classification" (an answer
            that is one of ``labels``).
        input_pattern, answer_pattern: regular expressions that must be found in them besides; empty = any.
        labels: of "classification".
        system: the system prompt of every question.
        chat_template: Jinja text that replaces the source tokenizer's own; empty = its own.
        question: what the discriminator is asked, with {input}, {yes} and {no}.
        yes, no: its answers, one token each.

    Raises:
        InputError: an unknown form, a broken regular expression, a question without {input}, equal answers.
    """

    form: TaskFormat = "free"
    input_pattern: str = ""
    answer_pattern: str = ""
    labels: tuple[str, ...] = ()
    system: str = ""
    chat_template: str = ""
    question: str = QUESTION
    yes: str = "Yes"
    no: str = "No"

    def __post_init__(self) -> None:
        if self.form not in get_args(TaskFormat):
            raise InputError(f"form must be one of {', '.join(get_args(TaskFormat))}, got '{self.form}'.")
        for name in ("input_pattern", "answer_pattern"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise InputError(f"{name} is no regular expression ({error}): '{getattr(self, name)}'.") from None
        if "{input}" not in self.question:
            raise InputError("The question to the discriminator needs {input}, the place of the text.")
        if not self.yes.strip() or not self.no.strip() or self.yes == self.no:
            raise InputError(f"The discriminator needs two different answers, got '{self.yes}' and '{self.no}'.")
        if self.form == "classification" and not self.labels:
            raise InputError("The form 'classification' needs its labels.")

    def takes_input(self, text: str) -> bool:
        """Whether ``text`` can be an input of the task."""
        if not text or read_input(text) != text or not re.search(self.input_pattern, text):
            return False
        return self.form != "choice" or len(_CHOICE.findall(text)) >= 2

    def takes_answer(self, text: str) -> bool:
        """Whether ``text`` can be an answer."""
        if not text.strip() or not re.search(self.answer_pattern, text):
            return False
        if self.form == "choice":
            return bool(re.match(r"\(?[A-Z]\b", text.strip()))
        if self.form == "math":
            return bool(re.search(r"\d", text))
        if self.form == "classification":
            return text.strip() in self.labels
        return self.form != "code" or _parses(text)

    def asked(self, text: str) -> str:
        """The question to the discriminator about one input."""
        # the text comes last, so that braces in it stay
        return self.question.replace("{yes}", self.yes).replace("{no}", self.no).replace("{input}", text)


def _parses(text: str) -> bool:
    fenced = re.search(r"```(?:\w+)?\n(.*?)```", text, re.DOTALL)
    try:
        ast.parse(fenced.group(1) if fenced else text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


# ------------------------------------------------------------------------------------------------ discriminator


def margin(logits: Tensor, yes: int, no: int) -> Tensor:
    """logit(Yes) - logit(No) of logits (..., vocabulary), in fp32."""
    found = logits.float()
    return found[..., yes] - found[..., no]


@dataclass(frozen=True)
class Judged:
    """A discriminator on inputs it was not trained on.

    Attributes:
        real, accepted: real inputs, and how many of them have a margin above 0.
        written, rejected: inputs written by the source, and how many have not.
    """

    real: int
    accepted: int
    written: int
    rejected: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return (self.accepted + self.rejected) / max(1, self.real + self.written)

    @property
    def p_chance(self) -> float:
        """Probability of as many right answers by tossing a coin (one-sided binomial test)."""
        n, right = self.real + self.written, self.accepted + self.rejected
        return sum(math.comb(n, k) for k in range(right, n + 1)) / 2**n


def judged(real: Sequence[float], written: Sequence[float]) -> Judged:
    """What margins of held-out real and written inputs say."""
    return Judged(len(real), sum(m > 0 for m in real), len(written), sum(m <= 0 for m in written))


def soft_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Mean KL(teacher || student) over the tokens that are learnt, fp32.

    Args:
        student, teacher: logits (batch, length, vocabulary).
        labels: (batch, length); -100 = not learnt. Logit t belongs to label t + 1.
    """
    from adapters.learn.ba_lora import consistency, valid_rows  # imports torch; the schema reads this module

    learnt = valid_rows(labels)
    return consistency(student[learnt], teacher[learnt], temperature=1.0)


# ------------------------------------------------------------------------------------------------ rejection sampling


def ngrams(text: str, n: int = 3) -> frozenset[str]:
    """Runs of ``n`` letters of the text, case and runs of white space aside; of a shorter one, the text itself."""
    plain = " ".join(text.lower().split())
    return frozenset(plain[at : at + n] for at in range(max(1, len(plain) - n + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Size of the intersection over that of the union."""
    return len(one & other) / len(one | other)


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different ones among all runs of ``n`` words: small where a generator has collapsed; 0 if none."""
    words = [text.split() for text in texts]
    runs = [tuple(one[at : at + n]) for one in words for at in range(len(one) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


@dataclass
class Synthesis:
    """Rejection sampling of inputs until ``wanted`` of them are kept.

    Attributes:
        wanted: N.
        template: what inputs and answers look like.
        seeds: count as seen, so that a copy of one is not new.
        tau: an input is kept if its margin is above this; None = no filter.
        tries: cap on inputs drawn per kept one, on average.
        near: n-gram similarity from which an input repeats an earlier one; above 1 = exact repeats only.
        kept: the inputs kept so far; ``counts``: how many draws had which outcome.

    Raises:
        InputError: wanted or tries below 1, tau not finite.
    """

    wanted: int
    template: TaskTemplate
    seeds: Sequence[str]
    tau: float | None = 0.0
    tries: int = 50
    near: float = 0.9
    kept: list[str] = field(default_factory=list)
    counts: Counter[Outcome] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.wanted < 1 or self.tries < 1:
            raise InputError(f"The number of examples and of tries must be 1 or more, got {self.wanted}, {self.tries}.")
        if self.tau is not None and not math.isfinite(self.tau):
            raise InputError(f"tau must be a finite number, got {self.tau}.")
        self._grams: dict[str, frozenset[str]] = {seed: ngrams(seed) for seed in map(normalised, self.seeds)}

    @property
    def full(self) -> bool:
        return len(self.kept) >= self.wanted

    @property
    def drawn(self) -> int:
        return sum(self.counts.values())

    @property
    def acceptance(self) -> float:
        """Share of the draws that were kept."""
        return self.counts["kept"] / max(1, self.drawn)

    def judge(self, text: str, margin: float | None = None, answer: str | None = None) -> Outcome:
        """What becomes of one input as :func:`read_input` read it; nothing changes.

        Args:
            margin: the discriminator's; not looked at without a filter.
            answer: the teacher's, or None if it has not been asked.

        Raises:
            InputError: there is a filter and no margin, or the margin is no number.
        """
        if not self.template.takes_input(text):
            return "unreadable"
        if self._repeats(text):
            return "repeated"
        if self.tau is not None:
            if margin is None or math.isnan(margin):
                raise InputError("The discriminator gives no number for an input: it or its base is damaged.")
            if not margin > self.tau:
                return "rejected"
        return "unanswered" if answer is not None and not self.template.takes_answer(answer) else "kept"

    def take(self, text: str, outcome: Outcome) -> None:
        """Record one draw with its outcome.

        Raises:
            InputError: too few of many draws were kept (with the acceptance rate, and why they were not).
        """
        self.counts[outcome] += 1
        if outcome == "kept":
            self.kept.append(text)
            self._grams[text] = ngrams(text)
        if not self.full and self.drawn >= self.tries * (len(self.kept) + 1):
            raise InputError(f"Only {self._told()}. {self._advice()}")

    def _repeats(self, text: str) -> bool:
        if text in self._grams:
            return True
        mine = ngrams(text)
        return self.near <= 1 and any(jaccard(mine, other) >= self.near for other in self._grams.values())

    def _told(self) -> str:
        others: Container[Outcome] = [name for name in get_args(Outcome) if name != "kept"]
        why = ", ".join(f"{self.counts[name]} {_WHY[name]}" for name in others if self.counts[name])
        return (
            f"{len(self.kept)} of {self.drawn} inputs that were written could be kept (acceptance "
            f"{self.acceptance:.1%}; {why})"
        )

    def _advice(self) -> str:
        worst = max((name for name in self.counts if name != "kept"), key=lambda name: self.counts[name])
        return _ADVICE[worst]


_WHY: dict[Outcome, str] = {
    "unreadable": "had another form",
    "repeated": "repeated earlier ones",
    "rejected": "were rejected by the discriminator",
    "unanswered": "got no usable answer",
}
_ADVICE: dict[Outcome, str] = {
    "unreadable": "Use a target that follows the examples better, or the other kind of prompting.",
    "repeated": "Raise temperature, give more seeds, or ask for fewer examples.",
    "rejected": "Lower tau, raise tries, or transfer without the filter.",
    "unanswered": "Raise answer_tokens, or correct the form and patterns of the task.",
}
