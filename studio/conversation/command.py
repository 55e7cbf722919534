"""``studio chat``: talk to a language model, with adapters, in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from adapters.errors import InputError
from studio import silence
from studio.cli.output import Json, Output, Quiet
from studio.conversation import options, parse_adapter, variants_of
from studio.conversation.talk import Talk

HELP = "Talk to a language model, with adapters."
COMMANDS = "Write a message. /clear forgets the conversation, /exit (or Ctrl-D) ends."


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("chat", help=HELP)(chat)


def chat(
    base: Annotated[str, typer.Argument(help="Language model: name in the library, directory or hub id.")] = "smollm2",
    adapter: options.Adapters = None,
    compare: options.Compare = False,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this, print the answer and exit.")] = None,
    system: options.System = "",
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.01, max=1, help="Sample among the likeliest words up to this probability.")
    ] = 0.95,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", min=0.5, max=5, help="Above 1 avoids repeating words.")
    ] = 1.0,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Precision = "auto",
    quantization: options.Quantization = "none",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Talk to a language model, with adapters."""
    output = Output(json, quiet)
    silence.library_warnings()
    options.check(dtype, quantization)
    if json and prompt is None:
        raise InputError("--json gives one answer: add --prompt with the question.")
    variants = variants_of([parse_adapter(text) for text in adapter or ()], compare)
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p,
              "repetition_penalty": repetition_penalty, "seed": seed}  # fmt: skip
    talk = Talk(base, variants, system, device, dtype, sampling, output, quantization)
    if prompt is not None:
        answers = talk.ask(prompt)
        if json:
            output.result(
                {"base": base, "prompt": prompt, "system": system, "sampling": sampling, "answers": answers}, ""
            )
        return
    _converse(talk)


def _converse(talk: Talk) -> None:
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
