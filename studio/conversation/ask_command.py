"""``studio ask``: ask a vision-language model about a picture, with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.pictures import open_picture
from studio import silence
from studio.cli.output import Json, Output, Quiet
from studio.conversation import options, parse_adapter, variants_of
from studio.conversation.talk import Talk

HELP = "Ask about a picture, with adapters."


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("ask", help=HELP)(ask)


def ask(
    picture: Annotated[Path, typer.Argument(help="The picture.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    base: Annotated[
        str, typer.Option("--base", help="Vision-language model: name in the library, directory or hub id.")
    ] = "tinysight",
    adapter: options.Adapters = None,
    compare: options.Compare = False,
    system: options.System = "",
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Precision = "auto",
    quantization: options.Quantization = "none",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask about a picture, with adapters."""
    output = Output(json, quiet)
    silence.library_warnings()
    options.check(dtype, quantization)
    open_picture(picture.expanduser())  # refused before anything is loaded
    variants = variants_of([parse_adapter(text) for text in adapter or ()], compare)
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    place = str(picture.expanduser())
    answers = Talk(base, variants, system, device, dtype, sampling, output, quantization, place).ask(question)
    if json:
        output.result({"base": base, "picture": place, "question": question, "sampling": sampling, "answers": answers},
                      "")  # fmt: skip
