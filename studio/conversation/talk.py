"""A conversation in the terminal: answers are printed as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from adapters.errors import InputError
from studio.cli.output import Output
from studio.conversation import Message, Question, Variant


class Talk:
    """The conversation of every variant (about ``picture``, if there is one), and the session that answers."""

    def __init__(
        self, base: str, variants: tuple[Variant, ...], system: str, device: str, dtype: str, sampling: dict[str, Any],
        output: Output, quantization: str = "none", picture: str = "",
    ) -> None:  # fmt: skip
        from studio.conversation.session import Session

        self.base, self.variants, self.device, self.dtype = base, variants, device, dtype
        self.sampling, self.output, self.session = sampling, output, Session()
        self.quantization, self.picture = quantization, picture
        self.start: list[Message] = [{"role": "system", "content": system}] if system else []
        self.clear()

    def clear(self) -> None:
        self.conversations = [list(self.start) for _ in self.variants]

    def ask(self, text: str) -> list[dict[str, Any]]:
        """Ask every variant; answers are printed as they come (not with --json) and returned."""
        for talk in self.conversations:
            talk.append({"role": "user", "content": text})
        question = Question(self.base, self.variants, tuple(map(tuple, self.conversations)), self.device, self.dtype,
                            self.sampling, self.quantization, self.picture)  # fmt: skip
        answers: list[dict[str, Any]] = [
            {"variant": variant.name, "adapters": [list(pair) for pair in variant.adapters], "text": ""}
            for variant in self.variants
        ]
        events = self.session.ask(question)
        try:
            with closing(events):
                self._follow(events, answers)
        except InputError:
            for talk in self.conversations:  # not answered: forget the question
                talk.pop()
            raise
        for talk, answer in zip(self.conversations, answers, strict=True):
            answer["text"] = answer["text"].strip()
            talk.append({"role": "assistant", "content": answer["text"] or "..."})
        return answers

    def _follow(self, events: Iterator[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
        shown = _Printed([variant.name for variant in self.variants]) if not self.output.json else None
        for event in events:
            kind = event["event"]
            if kind in ("loading", "remark"):
                self.output.note(event["text"])
            elif kind == "piece":
                answers[event["variant"]]["text"] += event["text"]
                if shown:
                    shown.add(event["variant"], event["text"])
            elif kind == "end":
                answers[event["variant"]]["seconds"] = event["seconds"]
                if shown:
                    shown.end(event["variant"])


class _Printed:
    """Prints answers that come at the same time one below the other: the first as it comes, then the next."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._held = [""] * len(names)
        self._ended = [False] * len(names)
        self._now = -1
        self._next()

    def add(self, number: int, text: str) -> None:
        self._held[number] += text
        self._flush()

    def end(self, number: int) -> None:
        self._ended[number] = True
        while self._now < len(self._names) and self._ended[self._now]:
            self._flush()
            print(flush=True)
            self._next()

    def _next(self) -> None:
        self._now += 1
        if self._now < len(self._names):
            if len(self._names) > 1:
                print(f"[{self._names[self._now]}]")
            self._flush()

    def _flush(self) -> None:
        if self._now < len(self._names):
            print(self._held[self._now], end="", flush=True)
            self._held[self._now] = ""
