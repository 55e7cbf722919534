"""The options that ``studio chat`` and ``studio ask`` share."""

from __future__ import annotations

from typing import Annotated

import typer

from adapters.compression.backends import QUANTIZATIONS, check_quantization
from adapters.errors import InputError

PRECISIONS = ("auto", "fp32", "fp16", "bf16")

Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", "-a", metavar="NAME[:STRENGTH]", help="An adapter; repeatable.")
]
Compare = Annotated[bool, typer.Option("--compare", help="Show the answers of the base and of each adapter alone.")]
System = Annotated[str, typer.Option("--system", help="System message.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer in tokens.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0, help="0 = always the likeliest word; 0.7 is lively.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same answer.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda ...")]
Precision = Annotated[str, typer.Option("--dtype", metavar="|".join(PRECISIONS), help="Precision.")]
Quantization = Annotated[
    str, typer.Option("--quantization", metavar="|".join(QUANTIZATIONS), help="Store the base in few bits.")
]


def check(dtype: str, quantization: str) -> None:
    """Raise :class:`InputError` for a precision or a storage that there is not."""
    if dtype not in PRECISIONS:
        raise InputError(f"--dtype is auto, fp32, fp16 or bf16, got '{dtype}'.")
    check_quantization(quantization)
