"""Positions of the words that name a subject in a tokenised prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from adapters.errors import InputError
from pipelines.diffusion.families.reading import Tokenized


def positions(tokens: Tokenized, words: Mapping[str, Sequence[int]], prompt: str, title: str) -> list[int]:
    """Positions of all tokens of the words' first occurrences in one encoder's text sequence, ascending.

    Args:
        tokens: the tokenised prompt.
        words: word -> its token ids.
        prompt, title: of the region, for errors.

    Raises:
        InputError: a word is not in the prompt, is beyond the last token that the model reads, or is a concept token
            that the tokenizer does not know.
    """
    found: set[int] = set()
    for word, ids in words.items():
        pieces = list(ids)
        if word.startswith("<") and word.endswith(">") and " " not in word and len(pieces) != 1:
            raise InputError(
                f"Region '{title}': the tokenizer does not know the concept token '{word}': load its adapter."
            )
        starts = range(len(tokens.content) - len(pieces) + 1)
        start = next((k for k in starts if pieces and list(tokens.content[k : k + len(pieces)]) == pieces), None)
        if start is None and word in prompt and tokens.lost:
            raise InputError(
                f"Region '{title}': the word '{word}' is beyond the {tokens.ids.numel()} tokens that the model reads: "
                "move it towards the beginning of the prompt."
            )
        if start is None:
            raise InputError(f"Region '{title}': its prompt '{prompt}' does not contain the word '{word}'.")
        found.update(tokens.places[start : start + len(pieces)])
    return sorted(found)


def spanned(spans: Sequence[tuple[int, int]], words: Sequence[str], prompt: str, title: str) -> list[int]:
    """Positions of all tokens of the words' first occurrences, ascending.

    Args:
        spans: the characters of the prompt that each token stands for.
        prompt, title: of the region, for errors.

    Raises:
        InputError: a word is not in the prompt, or beyond the last token that the model reads.
    """
    found: set[int] = set()
    for word in words:
        match = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt)
        if match is None:
            raise InputError(f"Region '{title}': its prompt '{prompt}' does not contain the word '{word}'.")
        places = {k for k, (first, last) in enumerate(spans) if first < match.end() and last > match.start()}
        if not places:
            raise InputError(
                f"Region '{title}': the word '{word}' is beyond the {len(spans)} tokens that the model reads: "
                "move it towards the beginning of the prompt."
            )
        found |= places
    return sorted(found)


def subject_words(words: Sequence[str], triggers: Sequence[str], prompt: str, title: str) -> tuple[str, ...]:
    """The words given, or the triggers that the prompt contains.

    Raises:
        InputError: there are none.
    """
    if words:
        return tuple(words)
    found = tuple(dict.fromkeys(trigger for trigger in triggers if trigger and trigger in prompt))
    if not found:
        raise InputError(
            f"Region '{title}': which word of '{prompt}' names its subject? Give words (an adapter's trigger words are "
            "used if the prompt contains them)."
        )
    return found
