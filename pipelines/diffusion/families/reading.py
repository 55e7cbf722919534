"""Encoding long prompts, and words with weights.

CLIP reads 75 tokens between its start and end tokens. Longer text is split into chunks of that size, which are encoded
separately and concatenated for the denoiser; a chunk ends at a comma if there is one among its last tokens (as in
AUTOMATIC1111's web UI). T5 reads as many tokens as the family gives it; words that do not fit are lost and reported.

A weight w moves the states z of its tokens away from those of an empty prompt: z_0 + w (z - z_0), as in ComfyUI.
The pooled embedding is that of the first chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipelines.diffusion.prompt_syntax import Piece, Prompt

if TYPE_CHECKING:
    from torch import Tensor

COMMA = 20
"""A chunk ends at a comma that is at most this many tokens before its end."""

MOST_CHUNKS = 40
"""Most chunks of one prompt; text beyond them is lost."""


@dataclass(frozen=True)
class Reader:
    """A text encoder.

    Attributes:
        encoder: its attribute in the pipeline.
        kind: "clip" reads in chunks, "t5" one sequence.
        length: tokens of a chunk, or of the sequence.
        most: largest number of chunks, or factor by which the sequence may be longer.
        places: the denoiser gets its tokens (otherwise only the pooled embedding).
    """

    encoder: str
    kind: Literal["clip", "t5"]
    length: int
    most: int = MOST_CHUNKS
    places: bool = True


@dataclass(frozen=True)
class Tokenized:
    """A prompt tokenised for one encoder.

    Attributes:
        ids, mask, weights: (chunks, tokens) each: token ids, 1 up to the end token, weights.
        empty: a chunk (1, tokens) without words.
        content: its token ids in order, without special tokens and padding.
        places: position of each of them in the concatenated chunks.
        lost: the words that did not fit.
    """

    ids: Tensor
    mask: Tensor
    weights: Tensor
    empty: Tensor
    content: tuple[int, ...]
    places: tuple[int, ...]
    lost: str = ""


def needed(tokenizer: Any, reader: Reader, prompt: Prompt) -> int:
    """Number of chunks that a prompt needs, at most ``reader.most`` (for T5: multiples of the usual length)."""
    if reader.kind == "clip":
        return min(len(_chunks(tokenizer, reader, prompt)), reader.most)
    count = sum(len(tokens) for tokens, _ in _tokens(tokenizer, _together(prompt))) + 1
    return min(-(-count // reader.length), reader.most)


def tokenize(tokenizer: Any, reader: Reader, prompt: Prompt, count: int = 1) -> Tokenized:
    """The prompt for this encoder in ``count`` chunks; what needs more (see :func:`needed`) is lost."""
    import torch

    chunks = _chunks(tokenizer, reader, prompt) if reader.kind == "clip" else [_flat(tokenizer, _together(prompt))]
    size = reader.length - 2 if reader.kind == "clip" else reader.length * count - 1
    behind = [token for chunk in chunks[count:] for token, _ in chunk]
    if reader.kind == "t5":
        behind, chunks = [token for token, _ in chunks[0][size:]], [chunks[0][:size]]
    else:
        chunks = [*chunks[:count], *[[]] * (count - len(chunks))]
    begin = [tokenizer.bos_token_id] if reader.kind == "clip" else []
    width = size + len(begin) + 1

    def row(tokens: Sequence[int]) -> list[int]:
        return _filled([*begin, *tokens, tokenizer.eos_token_id], tokenizer.pad_token_id, width)

    tokens = [[token for token, _ in chunk] for chunk in chunks]
    lost = tokenizer.decode(behind) if behind else ""
    return Tokenized(
        ids=torch.tensor([row(chunk) for chunk in tokens]),
        mask=torch.tensor([_filled([1] * (len(chunk) + len(begin) + 1), 0, width) for chunk in tokens]),
        weights=torch.tensor(
            [_filled([1.0] * len(begin) + [weight for _, weight in chunk], 1.0, width) for chunk in chunks]
        ),
        empty=torch.tensor([row([])]),
        content=tuple(token for chunk in tokens for token in chunk),
        places=tuple(n * width + len(begin) + k for n, chunk in enumerate(tokens) for k in range(len(chunk))),
        lost=lost.strip(),
    )


def states(
    pipe: Any, encoder: str, tokens: Tokenized, layer: int | None = None, masked: bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """Hidden states (1, chunks * tokens, width) of an encoder and its pooled embedding (1, width), if it has one.

    Args:
        layer: index of the hidden states; None = the encoder's output.
        masked: hide the padding from the encoder; None = as its configuration says.
    """
    import torch

    model, device = getattr(pipe, encoder), pipe._execution_device
    emphasised = bool((tokens.weights != 1).any())
    rows, mask = tokens.ids, tokens.mask
    if emphasised:
        rows, mask = torch.cat([rows, tokens.empty]), torch.cat([mask, mask[:1]])
    masked = getattr(model.config, "use_attention_mask", False) if masked is None else masked
    more = {"attention_mask": mask.to(device)} if masked else {}
    with torch.no_grad():
        output = model(rows.to(device), output_hidden_states=layer is not None, **more)
    found = output.last_hidden_state if layer is None else output.hidden_states[layer]
    if emphasised:
        found, empty = found[:-1], found[-1:]
        found = empty + (found - empty) * tokens.weights[..., None].to(found)
    pooled = getattr(output, "text_embeds", None)
    pooled = getattr(output, "pooler_output", None) if pooled is None else pooled
    return found.reshape(1, -1, found.shape[-1]).to(model.dtype), None if pooled is None else pooled[:1].to(model.dtype)


def _filled(values: list[Any], value: Any, width: int) -> list[Any]:
    return values + [value] * (width - len(values))


def _together(prompt: Prompt) -> tuple[Piece, ...]:
    """All parts as one, separated by spaces."""
    pieces = list(prompt.parts[0])
    for part in prompt.parts[1:]:
        pieces += [Piece(" "), *part]
    return tuple(pieces)


def _flat(tokenizer: Any, pieces: Sequence[Piece]) -> list[tuple[int, float]]:
    return [(token, weight) for tokens, weight in _tokens(tokenizer, pieces) for token in tokens]


def _tokens(tokenizer: Any, pieces: Sequence[Piece]) -> list[tuple[list[int], float]]:
    return [
        (tokenizer(piece.text, add_special_tokens=False, verbose=False).input_ids, piece.weight) for piece in pieces
    ]


def _chunks(tokenizer: Any, reader: Reader, prompt: Prompt) -> list[list[tuple[int, float]]]:
    """The tokens of a prompt, with weights, in chunks for a CLIP encoder; at least one."""
    size = reader.length - 2
    comma = tokenizer(",", add_special_tokens=False).input_ids[-1:]
    commas = {token for token in comma if token != tokenizer.unk_token_id}
    chunks: list[list[tuple[int, float]]] = []
    for part in prompt.parts:
        left = _flat(tokenizer, part)
        while len(left) > size:
            cut = size
            if left[size][0] not in commas:
                near = (k for k in range(size, max(size - COMMA, 1), -1) if left[k - 1][0] in commas)
                cut = next(near, size)
            chunks.append(left[:cut])
            left = left[cut:]
        chunks.append(left)
    return chunks
