"""How far transcripts are from what was said: word and character error rates, counted by jiwer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adapters.errors import InputError, MissingDependencyError
from pipelines.speech.transcript import loops

UNSPACED = ("zh", "ja", "th", "lo", "my", "yue", "chinese", "japanese", "thai", "cantonese")
"""Languages written without spaces between words: only their characters are counted."""


@dataclass(frozen=True)
class Score:
    """Errors over all utterances.

    Attributes:
        wer, cer: substitutions, deletions and insertions over the words (characters) of the references; above 1 where
            much is inserted.
        capped_cer: the same with at most as many errors per utterance as it has characters, so that a loop in one does
            not hide the others.
        loops: share of the transcripts that repeat themselves.
        utterances: their number.
    """

    wer: float
    cer: float
    capped_cer: float
    loops: float
    utterances: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def score(references: Sequence[str], transcripts: Sequence[str], language: str = "en", tokenizer: Any = None) -> Score:
    """Compare transcripts with what was said, both normalised the same way (:func:`normalised`).

    Raises:
        InputError: other numbers of them, or a reference without a word.
        MissingDependencyError: jiwer is not installed.
    """
    try:
        import jiwer
    except ImportError:
        raise MissingDependencyError("jiwer", "speech", "Error rates") from None
    if len(references) != len(transcripts) or not references:
        raise InputError(f"{len(references)} reference texts and {len(transcripts)} transcripts cannot be compared.")
    wanted = [normalised(text, language, tokenizer) for text in references]
    found = [normalised(text, language, tokenizer) for text in transcripts]
    if empty := next((number for number, text in enumerate(wanted, 1) if not text), 0):
        raise InputError(f"Reference text {empty} has no word to compare with: '{references[empty - 1]}'.")
    words = jiwer.process_words(wanted, found)
    errors, lengths = [], []
    for one, other in zip(wanted, found, strict=True):
        counted = jiwer.process_characters(one, other)
        errors.append(counted.substitutions + counted.deletions + counted.insertions)
        lengths.append(counted.hits + counted.substitutions + counted.deletions)
    capped = sum(min(wrong, length) for wrong, length in zip(errors, lengths, strict=True))
    cer = sum(errors) / sum(lengths)
    return Score(
        cer if language.lower() in UNSPACED else float(words.wer), cer, capped / sum(lengths),
        sum(loops(text) for text in transcripts) / len(transcripts), len(references),
    )  # fmt: skip


def normalised(text: str, language: str = "en", tokenizer: Any = None) -> str:
    """A text as it is compared: Whisper's own normalisation for English (numbers, contractions, spelling as far as
    ``tokenizer`` has a table of it) and for other languages; of unspaced languages the characters alone.

    Chinese is not mapped to one script: references in the script of the transcripts are needed.
    """
    from transformers.models.whisper import english_normalizer

    kinds: Any = english_normalizer

    if language.lower() in UNSPACED:
        return "".join(sign for sign in unicodedata.normalize("NFKC", text) if unicodedata.category(sign)[0] in "LMN")
    make: Any
    if language.lower() in ("", "en", "english"):
        make = kinds.EnglishTextNormalizer(getattr(tokenizer, "english_spelling_normalizer", None) or {})
    else:
        make = kinds.BasicTextNormalizer()
    return re.sub(r"\s+", " ", str(make(text))).strip()
