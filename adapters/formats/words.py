"""New words of an adapter: embeddings trained together with its layers.

Pivotal tuning trains a LoRA and a few embeddings that stand for one new word. kohya's programs and webui store both in
one file, each tensor of the embedding under ``bundle_emb.<word>.``:

    bundle_emb.toy.string_to_param.*      (vectors, width)   Stable Diffusion, webui's spelling
    bundle_emb.toy.emb_params             (vectors, width)   Stable Diffusion, kohya's spelling
    bundle_emb.toy.clip_l, .clip_g        (vectors, width)   Stable Diffusion XL, one per text encoder

In a prompt the word stands for its vectors, one token each. Formats that cannot hold words put them in a second file,
``<name>.words.safetensors``, with the same keys (``new_concept_embedding.<word>`` for an ED-LoRA's); the adapter lists
its words in its metadata, so that a missing file is noticed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import InputError
from adapters.files import WORDS, WORDS_ENTRY
from adapters.formats.lora import LoraFile

if TYPE_CHECKING:
    from torch import Tensor

Words = Mapping[str, Mapping[str, "Tensor"]]
"""word -> text encoder -> (vectors, width)."""

BUNDLED = "bundle_emb."
"""Prefix of the keys of words."""

_BUNDLED = re.compile(r"^bundle_emb\.([^.]+)\.(.+)$")
_ROWS = "new_concept_embedding."
_ENCODERS = {"clip_l": "text_encoder", "emb_params": "text_encoder", "clip_g": "text_encoder_2"}
_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def split_words(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The tensors that belong to no word, and the words.

    Raises:
        InputError: a word has no embedding, two for one text encoder, one for an unsupported encoder, one that is not
            (vectors, width), or different numbers of vectors for its encoders.
    """
    rest: dict[str, Tensor] = {}
    words: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _BUNDLED.match(key)
        if match is None:
            rest[key] = tensor
            continue
        word, kind = match.groups()
        words.setdefault(word, {})
        if kind.startswith("string_to_token."):
            continue  # the word's id in the tokenizer it was trained with
        encoder = "text_encoder" if kind.startswith("string_to_param.") else _ENCODERS.get(kind)
        if encoder is None:
            raise InputError(
                f"{source}: the word '{word}' has embeddings '{kind}'; only CLIP's are supported "
                f"(string_to_param, {', '.join(_ENCODERS)})."
            )
        rows = tensor[None] if tensor.ndim == 1 else tensor
        if rows.ndim != 2 or not rows.numel():
            raise InputError(
                f"{source}: the embedding of '{word}' must be (vectors, width), got {tuple(tensor.shape)}."
            )
        if encoder in words[word]:
            raise InputError(f"{source}: the word '{word}' has two embeddings for one text encoder.")
        words[word][encoder] = rows
    for word, encoders in words.items():
        if not encoders:
            raise InputError(f"{source}: the word '{word}' has no embedding.")
        if len({len(rows) for rows in encoders.values()}) > 1:
            raise InputError(f"{source}: the word '{word}' has more vectors for one text encoder than for the other.")
    return rest, words


def word_tensors(words: Words) -> dict[str, Tensor]:
    """Words as tensors of a kohya file; those for one text encoder in webui's spelling, which most programs read."""
    made = {}
    for word, encoders in words.items():
        if set(encoders) == {"text_encoder"}:
            made[f"bundle_emb.{word}.string_to_param.*"] = encoders["text_encoder"]
        else:
            made |= {f"bundle_emb.{word}.{_KEYS[encoder]}": rows for encoder, rows in encoders.items()}
    return made


def with_words_of(file: LoraFile, files: Iterable[LoraFile]) -> LoraFile:
    """``file`` with the words of the ``files`` it was merged from.

    Raises:
        InputError: two of them have the same word.
    """
    words: dict[str, Mapping[str, Tensor]] = {}
    rows: dict[str, Tensor] = {}
    for one in files:
        for word in (*one.words, *one.embeddings):
            if word in words or word in rows:
                raise InputError(f"Two of the adapters have the word '{word}': one adapter cannot hold both.")
        words |= one.words
        rows |= one.embeddings
    return replace(file, words=words, embeddings=rows)


def beside(path: Path) -> Path:
    """The file with the words of the adapter at ``path``."""
    return path.with_suffix(WORDS)


def write_beside(file: LoraFile, path: Path, text: Mapping[str, str]) -> dict[str, str]:
    """Write the words of ``file``, if any, beside the adapter at ``path``.

    Returns:
        The adapter's metadata: ``text`` with the entry that lists the words.
    """
    others = {key: value for key, value in text.items() if key != WORDS_ENTRY}
    if not file.words and not file.embeddings:
        return others
    from adapters.formats.tensors import write_tensors

    rows = {f"{_ROWS}{word}": tensor for word, tensor in file.embeddings.items()}
    write_tensors(beside(path), word_tensors(file.words) | rows, {})
    return others | {WORDS_ENTRY: json.dumps([*file.words, *file.embeddings])}


def read_beside(file: LoraFile, path: Path) -> LoraFile:
    """``file`` with the words that its metadata lists.

    Raises:
        InputError: the file with the words is missing or holds other words.
    """
    if WORDS_ENTRY not in file.metadata:
        return file
    try:
        named = [str(word) for word in json.loads(file.metadata[WORDS_ENTRY])]
    except (json.JSONDecodeError, RecursionError, TypeError) as error:
        raise InputError(f"'{path.name}': its entry '{WORDS_ENTRY}' is not a list of words ({error}).") from None
    place = beside(path)
    if not place.is_file():
        raise InputError(
            f"The file '{place.name}' with the words of '{path.name}' ({', '.join(named)}) is missing: keep both files "
            "in one folder."
        )
    from adapters.formats.tensors import check_finite, read_tensors

    tensors, _ = read_tensors(place)
    check_finite(tensors, f"'{place.name}'")
    rest, words = split_words(tensors, f"'{place.name}'")
    rows = {key.removeprefix(_ROWS): tensor for key, tensor in rest.items() if key.startswith(_ROWS)}
    if {*words, *rows} != set(named) or len(rows) != len(rest):
        raise InputError(f"'{place.name}' does not hold the words of '{path.name}' ({', '.join(named)}).")
    return replace(file, words={**file.words, **words}, embeddings=rows)
