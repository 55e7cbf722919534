"""Where the words that name a subject stand in a tokenised prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapters.errors import InputError


def positions(tokenizer: Any, prompt: str, words: Sequence[str], title: str, limit: int | None = None) -> list[int]:
    """Positions, in the whole padded token sequence, of every piece of every word (its first occurrence).

    Args:
        limit: how many tokens the model reads (None: what the tokenizer says).

    Raises:
        InputError: a word is not in the prompt, lies behind the last token that the model reads, or is a placeholder
            that the tokenizer does not know.
    """
    limit = limit or tokenizer.model_max_length
    whole = tokenizer(prompt, truncation=False, padding=False).input_ids
    found: list[int] = []
    for word in words:
        pieces = tokenizer(word, add_special_tokens=False).input_ids
        if word.startswith("<") and word.endswith(">") and " " not in word and len(pieces) != 1:
            raise InputError(
                f"Region '{title}': the tokenizer does not know the concept token '{word}'; load the adapter of it."
            )
        start = next((k for k in range(len(whole)) if pieces and whole[k : k + len(pieces)] == pieces), None)
        if start is None:
            raise InputError(f"Region '{title}': its prompt '{prompt}' does not hold the word '{word}'.")
        if start + len(pieces) > limit - 1:  # the last position is the end mark
            raise InputError(
                f"Region '{title}': the word '{word}' stands behind the {limit} tokens that the model reads: "
                "put it nearer to the beginning of the prompt."
            )
        found += range(start, start + len(pieces))
    return sorted(set(found))


def subject_words(words: Sequence[str], triggers: Sequence[str], prompt: str, title: str) -> tuple[str, ...]:
    """The words given, or the triggers that the prompt holds.

    Raises:
        InputError: there are none.
    """
    if words:
        return tuple(words)
    held = tuple(dict.fromkeys(trigger for trigger in triggers if trigger and trigger in prompt))
    if not held:
        raise InputError(
            f"Region '{title}': which word of '{prompt}' names its subject? Give words (an adapter's trigger words are "
            "taken where the prompt holds them)."
        )
    return held


def joint_positions(
    readers: Sequence[tuple[Any, int, int]], prompt: str, words: Sequence[str], title: str
) -> list[int]:
    """Positions of the words in the text sequence of a joint transformer.

    Args:
        readers: tokenizer, first position and number of tokens of every part of the sequence
            (:meth:`pipelines.diffusion.families.Family.text_parts`).

    Raises:
        InputError: as :func:`positions`.
    """
    return [
        start + number
        for tokenizer, start, limit in readers
        for number in positions(tokenizer, prompt, words, title, limit)
    ]
