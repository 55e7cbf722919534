"""ED-LoRA's words (Mix-of-Show, arXiv 2305.18292): one embedding per cross-attention layer.

For the time of an encoding the tokenizer is a copy that knows ``<word>`` and one token for each of its layers, and the
token table answers those tokens with the adapter's rows. A prompt becomes as many prompts as there are layers, with the
word replaced by that layer's token, and each layer reads its own (layers in the order down, middle, up).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapters.errors import FamilyError, InputError

Words = Mapping[str, Tensor]
"""word -> (layers, width)."""


def check_words(words: Words, known: Words, layers: int, width: int, tokenizer: Any, name: str) -> None:
    """Refuse words that this model cannot use.

    Args:
        words: of the adapter ``name``.
        known: of the adapters loaded before.
        layers, width: cross-attention layers of the denoiser, width of the text encoder.

    Raises:
        FamilyError: another number of layers or another width.
        InputError: a word that another adapter or the tokenizer already has.
    """
    for word, rows in words.items():
        if tuple(rows.shape) != (layers, width):
            raise FamilyError(
                f"'{name}': the word '{word}' has {rows.shape[0]} embeddings of width {rows.shape[1]}; this model has "
                f"{layers} cross-attention layers and a text width of {width}."
            )
        if word in known or word in tokenizer.get_vocab():
            raise InputError(f"'{name}': the word '{word}' is already taken by another adapter or by the tokenizer.")


def with_words(tokenizer: Any, words: Words) -> Any:
    """A copy of the tokenizer that knows the words (as one token each)."""
    known = copy.deepcopy(tokenizer)
    known.add_tokens([token for word, rows in words.items() for token in (word, *_tokens(word, len(rows)))])
    return known


def expanded(prompt: str, words: Words) -> list[str]:
    """The prompt once per layer, with every word replaced by that layer's token."""
    made = []
    for layer in range(len(next(iter(words.values())))):
        text = prompt
        for word, rows in words.items():
            text = text.replace(word, _tokens(word, len(rows))[layer])
        made.append(text)
    return made


@contextmanager
def speaking(pipe: Any, words: Words) -> Iterator[None]:
    """Let the pipeline's tokenizer and text encoder know the words; afterwards both are what they were."""
    own, table = pipe.tokenizer, pipe.text_encoder.get_input_embeddings()
    tokenizer = with_words(own, words)
    rows = {
        tokenizer.convert_tokens_to_ids(token): row
        for word, tensor in words.items()
        for token, row in zip((word, *_tokens(word, len(tensor))), (tensor.mean(0), *tensor), strict=True)
    }
    given: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given[:] = [args[0]]
        new = torch.tensor(list(rows), device=args[0].device)
        return torch.where(torch.isin(args[0], new), torch.zeros_like(args[0]), args[0]), *args[1:]

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        made = output.clone()
        for number, row in rows.items():
            made[given[0] == number] = row.to(made)
        return made

    handles = [table.register_forward_pre_hook(before), table.register_forward_hook(after)]
    pipe.tokenizer = tokenizer
    try:
        yield
    finally:
        pipe.tokenizer = own
        for handle in handles:
            handle.remove()


def _tokens(word: str, layers: int) -> list[str]:
    """The token of each layer; letters and figures in angle brackets, so that no other token is part of it."""
    return [f"<{word.strip('<>')}:{layer}>" for layer in range(layers)]
