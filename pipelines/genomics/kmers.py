"""Nucleotides as k-mer tokens, by the vocabulary of a checkpoint.

A transcript of n nucleotides gives max(0, (n - k) // stride + 1) tokens: with stride 1 each overlaps its neighbour in
k - 1 letters (LoRA-BERT k = 3, DNABERT k = 3 .. 6); with stride k none overlap, so that k times as much fits the model,
and the reading frame depends on the first letter. A k-mer with a letter other than A, C, G, T is [UNK].

The order of tokens is the checkpoint's own, read from its ``vocab.txt`` and never computed again. A new vocabulary has
DNABERT's order: five special tokens, then the k-mers over A, T, C, G.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adapters import files
from adapters.errors import InputError
from pipelines.genomics.orf import codes_of

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_VOCABULARY = "vocab.txt"
_SETTINGS = "tokenizer_config.json"


@dataclass(frozen=True)
class Kmers:
    """A k-mer vocabulary and how sequences are read with it.

    Attributes:
        k: letters of a token.
        stride: letters between the starts of two tokens.
        vocabulary: the tokens in the order of their numbers.
        longest: most tokens of one input, [CLS] and [SEP] included.
    """

    k: int
    stride: int
    vocabulary: tuple[str, ...]
    longest: int

    @classmethod
    def new(cls, k: int = 3, stride: int = 1, longest: int = 512) -> Kmers:
        """A new vocabulary in DNABERT's order: 4^k + 5 tokens."""
        words = ("".join(letters) for letters in itertools.product("ATCG", repeat=k))
        return cls(k, stride, (*SPECIAL, *words), longest)

    @classmethod
    def read(cls, folder: Path, longest: int, stride: int | None = None) -> Kmers:
        """The vocabulary of a checkpoint.

        Args:
            longest: tokens the model reads.
            stride: None = as the checkpoint says, or 1.

        Raises:
            InputError: there is none, or it does not hold every k-mer of one length.
        """
        vocabulary = _words(folder)
        k = word_length(vocabulary)
        if k is None:
            raise InputError(
                f"'{folder}' is no k-mer model: its vocabulary ({len(vocabulary)} tokens) does not hold every word of "
                "one length over A, C, G, T, as DNABERT's and LoRA-BERT's do."
            )
        told = _settings(folder)
        return cls(k, stride or int(told.get("stride", 1)), tuple(vocabulary), longest)

    def write(self, folder: Path) -> None:
        """Write ``vocab.txt`` and ``tokenizer_config.json``, which transformers' BertTokenizer reads: its input is the
        k-mers with spaces between them."""
        files.write_text(folder / _VOCABULARY, "".join(f"{word}\n" for word in self.vocabulary))
        special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
        lower = not any(re.fullmatch("[ACGT]+", word) for word in self.vocabulary)
        settings = {
            "tokenizer_class": "BertTokenizer", "do_lower_case": lower, "strip_accents": False, "kmer": self.k,
            "stride": self.stride, "model_max_length": self.longest, **special,
        }  # fmt: skip
        files.write_text(folder / _SETTINGS, json.dumps(settings, indent=2) + "\n")

    def __len__(self) -> int:
        return len(self.vocabulary)

    def number(self, token: str) -> int:
        """Number of a special token."""
        return self.vocabulary.index(token)

    @cached_property
    def _numbers(self) -> np.ndarray:
        """k-mer as a number in base 4 -> token (4^k + 1,); the last entry is [UNK]."""
        found = np.full(4**self.k + 1, self.number("[UNK]"), dtype=np.int64)
        for token, word in enumerate(self.vocabulary):
            if is_word(word) and len(word) == self.k:
                found[self._place(codes_of(word.upper()))[0]] = token
        return found

    def _place(self, codes: np.ndarray) -> np.ndarray:
        """Every k-mer of letters (n,) as its number in base 4 (n - k + 1,), or 4^k if it holds an unknown letter."""
        windows = np.lib.stride_tricks.sliding_window_view(codes, self.k)
        powers = 4 ** np.arange(self.k - 1, -1, -1)
        return np.where((windows > 3).any(axis=1), 4**self.k, windows @ powers)

    def tokens(self, sequence: str, offset: int = 0) -> np.ndarray:
        """Tokens of a sequence from letter ``offset`` on, without [CLS] and [SEP]: (max(0, (n - k) // stride + 1),)."""
        if len(sequence) - offset < self.k:
            return np.zeros(0, dtype=np.int64)
        found: np.ndarray = self._numbers[self._place(codes_of(sequence)[offset:])[:: self.stride]]
        return found

    def encode(self, sequence: str, offset: int = 0) -> list[int]:
        """[CLS], the first ``longest - 2`` tokens, [SEP]."""
        found = self.tokens(sequence[offset : offset + self.reach]).tolist()
        return [self.number("[CLS]"), *found, self.number("[SEP]")]

    def decode(self, tokens: Sequence[int]) -> str:
        """The nucleotides that tokens stand for; unknown ones as N."""
        words = [self.vocabulary[token].upper() for token in tokens]
        words = [word if is_word(word) else "N" * self.k for word in words if word not in _AROUND]
        if not words:
            return ""
        if self.stride >= self.k:
            return "".join(words)
        return words[0] + "".join(word[self.k - self.stride :] for word in words[1:])

    @property
    def reach(self) -> int:
        """Nucleotides that fit one input."""
        return (self.longest - 3) * self.stride + self.k

    def to_nucleotides(self, values: np.ndarray, length: int) -> np.ndarray:
        """A value per token as a value per nucleotide (length,): the mean over the tokens that hold it; 0 where none
        does."""
        total, count = np.zeros(length), np.zeros(length)
        for number, value in enumerate(values):
            place = slice(number * self.stride, number * self.stride + self.k)
            total[place] += value
            count[place] += 1
        return np.divide(total, count, out=np.zeros(length), where=count > 0)


_AROUND = ("[PAD]", "[CLS]", "[SEP]")


def is_word(token: str) -> bool:
    """Whether a token is a k-mer over A, C, G, T, of either case."""
    return re.fullmatch("[ACGT]+|[acgt]+", token) is not None


def word_length(vocabulary: Sequence[str]) -> int | None:
    """k of a vocabulary that holds every k-mer of one length k from 2 to 8; None for others.

    Shorter words may be there too, as WordPiece leaves the single letters in the published LoRA-BERT vocabulary.
    """
    words = {word.upper() for word in vocabulary if is_word(word)}
    k = max(map(len, words), default=0)
    whole = 2 <= k <= 8 and sum(len(word) == k for word in words) == 4**k
    special = set(SPECIAL) <= set(vocabulary)
    return k if whole and special else None


def is_kmer_folder(folder: Path) -> bool:
    """Whether a checkpoint's vocabulary is one of k-mers; other vocabularies are mostly told by their size."""
    try:
        size = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
        return any(4**k < size <= 4**k + 64 for k in range(2, 9)) and word_length(_words(folder)) is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _words(folder: Path) -> list[str]:
    file, other = folder / _VOCABULARY, folder / "tokenizer.json"
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8").split()
        if other.is_file():
            listed = json.loads(other.read_text(encoding="utf-8"))["model"]["vocab"]
            return [str(word) for word, _ in sorted(listed.items(), key=lambda item: item[1])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"The vocabulary in '{folder}' cannot be read.") from None
    raise InputError(f"'{folder}' has no vocabulary (vocab.txt or tokenizer.json).")


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
