"""``studio chat``: talk to a language model, with adapters, in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Annotated, Any

import typer

from adapters.compression.backends import QUANTIZATIONS, check_quantization
from adapters.errors import InputError
from studio import silence
from studio.cli.output import Json, Output, Quiet
from studio.conversation import Message, Question, Variant, parse_adapter, variants_of

HELP = "Talk to a language model, with adapters."
COMMANDS = "Write a message. /clear forgets the conversation, /exit (or Ctrl-D) ends."


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("chat", help=HELP)(chat)


def chat(
    base: Annotated[str, typer.Argument(help="Language model: name in the library, directory or hub id.")] = "smollm2",
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="NAME[:STRENGTH]", help="An adapter; repeatable."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the answers of the base and of each adapter alone.")
    ] = False,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this, print the answer and exit.")] = None,
    system: Annotated[str, typer.Option("--system", help="System message.")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0 = always the likeliest word; 0.7 is lively.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.01, max=1, help="Sample among the likeliest words up to this probability.")
    ] = 0.95,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", min=0.5, max=5, help="Above 1 avoids repeating words.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same answer.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda ...")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", metavar="auto|fp32|fp16|bf16", help="Precision.")] = "auto",
    quantization: Annotated[
        str, typer.Option("--quantization", metavar="|".join(QUANTIZATIONS), help="Store the base in few bits.")
    ] = "none",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Talk to a language model, with adapters."""
    output = Output(json, quiet)
    silence.library_warnings()
    if dtype not in ("auto", "fp32", "fp16", "bf16"):
        raise InputError(f"--dtype is auto, fp32, fp16 or bf16, got '{dtype}'.")
    if json and prompt is None:
        raise InputError("--json gives one answer: add --prompt with the question.")
    variants = variants_of([parse_adapter(text) for text in adapter or ()], compare)
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p,
              "repetition_penalty": repetition_penalty, "seed": seed}  # fmt: skip
    check_quantization(quantization)
    talk = _Talk(base, variants, system, device, dtype, sampling, output, quantization)
    if prompt is not None:
        answers = talk.ask(prompt)
        if json:
            output.result(
                {"base": base, "prompt": prompt, "system": system, "sampling": sampling, "answers": answers}, ""
            )
        return
    _converse(talk)


class _Talk:
    """The conversation of every variant, and the session that answers."""

    def __init__(
        self, base: str, variants: tuple[Variant, ...], system: str, device: str, dtype: str, sampling: dict[str, Any],
        output: Output, quantization: str = "none",
    ) -> None:  # fmt: skip
        from studio.conversation.session import Session

        self.base, self.variants, self.device, self.dtype = base, variants, device, dtype
        self.sampling, self.output, self.session = sampling, output, Session()
        self.quantization = quantization
        self.start: list[Message] = [{"role": "system", "content": system}] if system else []
        self.clear()

    def clear(self) -> None:
        self.conversations = [list(self.start) for _ in self.variants]

    def ask(self, text: str) -> list[dict[str, Any]]:
        """Ask every variant; answers are printed as they come (not with --json) and returned."""
        for talk in self.conversations:
            talk.append({"role": "user", "content": text})
        question = Question(self.base, self.variants, tuple(map(tuple, self.conversations)), self.device, self.dtype,
                            self.sampling, self.quantization)  # fmt: skip
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
        loud = not self.output.json
        for event in events:
            kind = event["event"]
            if kind in ("loading", "remark"):
                self.output.note(event["text"])
            elif kind == "begin" and loud and len(self.variants) > 1:
                print(f"[{self.variants[event['variant']].name}]")
            elif kind == "piece":
                answers[event["variant"]]["text"] += event["text"]
                if loud:
                    print(event["text"], end="", flush=True)
            elif kind == "end":
                answers[event["variant"]]["seconds"] = event["seconds"]
                if loud:
                    print(flush=True)


def _converse(talk: _Talk) -> None:
    talk.output.note(COMMANDS)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if text in ("/exit", "/quit"):
            return
        if text == "/clear":
            talk.clear()
        elif text:
            try:
                talk.ask(text)
            except KeyboardInterrupt:
                print(flush=True)
            except InputError as error:
                print(f"studio: {error}", file=sys.stderr)
