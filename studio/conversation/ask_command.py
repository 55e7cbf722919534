"""``studio ask``: ask a vision-language model about a picture, with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapters.compression.backends import QUANTIZATIONS, check_quantization
from adapters.errors import InputError
from pipelines.pictures import open_picture
from studio import silence
from studio.cli.output import Json, Output, Quiet
from studio.conversation import parse_adapter, variants_of
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
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="NAME[:STRENGTH]", help="An adapter; repeatable."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the answers of the base and of each adapter alone.")
    ] = False,
    system: Annotated[str, typer.Option("--system", help="System message.")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer in tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0 = always the likeliest word; 0.7 is lively.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same answer.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda ...")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", metavar="auto|fp32|fp16|bf16", help="Precision.")] = "auto",
    quantization: Annotated[
        str, typer.Option("--quantization", metavar="|".join(QUANTIZATIONS), help="Store the base in few bits.")
    ] = "none",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask about a picture, with adapters."""
    output = Output(json, quiet)
    silence.library_warnings()
    if dtype not in ("auto", "fp32", "fp16", "bf16"):
        raise InputError(f"--dtype is auto, fp32, fp16 or bf16, got '{dtype}'.")
    check_quantization(quantization)
    open_picture(picture.expanduser())  # refused before anything is loaded
    variants = variants_of([parse_adapter(text) for text in adapter or ()], compare)
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    place = str(picture.expanduser())
    answers = Talk(base, variants, system, device, dtype, sampling, output, quantization, place).ask(question)
    if json:
        output.result({"base": base, "picture": place, "question": question, "sampling": sampling, "answers": answers},
                      "")  # fmt: skip
