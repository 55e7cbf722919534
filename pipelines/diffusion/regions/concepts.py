"""The adapters' own words, of two kinds.

*Pivotal tuning*: a word stands for a few vectors, one token each, in each text encoder. In a prompt the word is
replaced by its tokens ("spelled").

*ED-LoRA* (Mix-of-Show, arXiv 2305.18292): a word has one embedding per cross-attention layer. A prompt becomes one
prompt per layer (in the order down, middle, up), with the word replaced by that layer's token.

During an encoding the tokenizers are replaced by copies that know these tokens, and the token embeddings return the
adapter's vectors for them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapters.errors import FamilyError, InputError
from adapters.formats.words import Words

LayerWords = Mapping[str, Tensor]
"""ED-LoRA: word -> (layers, width)."""

Tokens = Mapping[str, Mapping[str, Tensor]]
"""text encoder -> token -> its embedding (width,)."""


def check_taken(words: Collection[str], known: Collection[str], name: str) -> None:
    """Raise :class:`InputError` if a word of the adapter ``name`` is already ``known``."""
    for word in words:
        if word in known:
            raise InputError(f"'{name}': the word '{word}' is already taken by another adapter or by the tokenizer.")


def check_layer_words(words: LayerWords, layers: int, width: int, name: str) -> None:
    """Check that an ED-LoRA's words fit this model.

    Args:
        words: of the adapter.
        layers: number of cross-attention layers of the denoiser.
        width: of the text encoder.
        name: of the adapter.

    Raises:
        FamilyError: the number of layers or the width differs.
    """
    for word, rows in words.items():
        if tuple(rows.shape) != (layers, width):
            raise FamilyError(
                f"'{name}': the word '{word}' has {rows.shape[0]} embeddings of width {rows.shape[1]}; this model has "
                f"{layers} cross-attention layers and a text width of {width}."
            )


def check_words(words: Words, widths: Mapping[str, int], base: str, name: str) -> None:
    """Check that words of pivotal tuning fit this model.

    Args:
        words: of the adapter.
        widths: text encoder of the model -> its width.
        base: name of the model in errors.
        name: of the adapter.

    Raises:
        FamilyError: the text encoders or their widths differ.
    """
    for word, encoders in words.items():
        found = {encoder: rows.shape[1] for encoder, rows in encoders.items()}
        if found != dict(widths):
            shown = [", ".join(f"{part} {width}" for part, width in table.items()) for table in (found, widths)]
            raise FamilyError(
                f"'{name}': the word '{word}' has embeddings of width {shown[0]}; {base} needs {shown[1] or 'none'}."
            )


def spelled(prompt: str, words: Words) -> str:
    """The prompt with every word replaced by its tokens (case does not matter)."""
    tokens = {word.lower(): " ".join(_tokens(word, len(next(iter(rows.values()))))) for word, rows in words.items()}
    if not tokens:
        return prompt
    longest_first = "|".join(re.escape(word) for word in sorted(tokens, key=len, reverse=True))
    found = re.compile(rf"(?<!\w)({longest_first})(?!\w)", re.IGNORECASE)
    return found.sub(lambda match: tokens[match[0].lower()], prompt)


def word_tokens(words: Words) -> dict[str, dict[str, Tensor]]:
    """The tokens of words of pivotal tuning, by text encoder."""
    made: dict[str, dict[str, Tensor]] = {}
    for word, encoders in words.items():
        for encoder, rows in encoders.items():
            made.setdefault(encoder, {}).update(zip(_tokens(word, len(rows)), rows, strict=True))
    return made


def layer_tokens(words: LayerWords) -> dict[str, dict[str, Tensor]]:
    """The tokens of an ED-LoRA's words: one for each layer, and the word itself as their mean."""
    rows = {
        token: row
        for word, tensor in words.items()
        for token, row in zip((word, *_tokens(word, len(tensor))), (tensor.mean(0), *tensor), strict=True)
    }
    return {"text_encoder": rows} if rows else {}


def with_tokens(tokenizer: Any, tokens: Collection[str]) -> Any:
    """The tokenizer, or a copy of it that knows the tokens."""
    if not tokens:
        return tokenizer
    known = copy.deepcopy(tokenizer)
    known.add_tokens(list(tokens))
    return known


def expanded(prompt: str, words: LayerWords) -> list[str]:
    """The prompt once per layer, with every word replaced by that layer's token."""
    return [in_layer(prompt, words, layer) for layer in range(len(next(iter(words.values()))))]


def in_layer(text: str, words: LayerWords, layer: int) -> str:
    """The text with every word replaced by the token of ``layer``."""
    for word, rows in words.items():
        text = text.replace(word, _tokens(word, len(rows))[layer])
    return text


@contextmanager
def knowing(pipe: Any, tokens: Tokens) -> Iterator[None]:
    """Inside, the pipeline's tokenizers and text encoders know the tokens; restored on exit."""
    with ExitStack() as stack:
        for encoder, rows in tokens.items():
            stack.enter_context(_knowing(pipe, encoder, rows))
        yield


@contextmanager
def _knowing(pipe: Any, encoder: str, tokens: Mapping[str, Tensor]) -> Iterator[None]:
    name = encoder.replace("text_encoder", "tokenizer")
    own, model = getattr(pipe, name), getattr(pipe, encoder)
    tokenizer = with_tokens(own, tokens)
    rows = {tokenizer.convert_tokens_to_ids(token): row for token, row in tokens.items()}
    given: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # the new ids are hidden from the model: some CLIP versions take the largest id as the end token
        numbers = args[0] if args else kwargs["input_ids"]
        given[:] = [numbers]
        new = torch.tensor(list(rows), device=numbers.device)
        known = torch.where(torch.isin(numbers, new), torch.zeros_like(numbers), numbers)
        return ((known, *args[1:]), kwargs) if args else (args, {**kwargs, "input_ids": known})

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        made = output.clone()
        for number, row in rows.items():
            made[given[0] == number] = row.to(made)
        return made

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.get_input_embeddings().register_forward_hook(after),
    ]
    setattr(pipe, name, tokenizer)
    try:
        yield
    finally:
        setattr(pipe, name, own)
        for handle in handles:
            handle.remove()


def _tokens(word: str, count: int) -> list[str]:
    """The token of each vector or layer, in angle brackets, so that no token is part of another."""
    return [f"<{word.strip('<>')}:{layer}>" for layer in range(count)]
