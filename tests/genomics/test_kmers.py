"""Tokens and reading frames against the plain definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from adapters.errors import InputError
from pipelines.genomics.kmers import Kmers
from pipelines.genomics.masking import IGNORED, mask_spans, neighbours
from pipelines.genomics.orf import Orf, longest_orf, reverse_complement
from tests.genomics.conftest import SPECIAL, WORDS, letters

DNA = st.text("ACGT", max_size=80)


@given(DNA, st.sampled_from([1, 2, 3]))
def test_counts_and_round_trip(sequence, stride):
    kmers = Kmers.new(3, stride, longest=22)
    tokens = kmers.tokens(sequence)
    assert len(tokens) == max(0, (len(sequence) - 3) // stride + 1)
    ids = kmers.encode(sequence)
    assert len(ids) <= 22
    read = min(len(tokens), 20)
    assert kmers.decode(ids) == (sequence[: 3 + stride * (read - 1)] if read else "")
    assert kmers.reach == 3 + stride * 19


def test_every_word_has_its_own_token_in_the_order_of_dnabert():
    for k in (3, 6):
        kmers = Kmers.new(k)
        assert list(kmers.vocabulary) == [*SPECIAL, *WORDS[k]]
        assert [int(kmers.tokens(word)[0]) for word in WORDS[k]] == list(range(5, 5 + 4**k))


def test_stock_tokenizer_gives_the_same_tokens(tmp_path):
    """Also for the published LoRA-BERT vocabulary: lower case, two more special tokens, single letters."""
    published = [*SPECIAL, "<S>", "<T>", *"acgt", *(word.lower() for word in sorted(WORDS[3]))]
    for vocabulary in (Kmers.new(3).vocabulary, tuple(published)):
        folder = tmp_path / str(len(vocabulary))
        folder.mkdir()
        Kmers(3, 1, vocabulary, 40).write(folder)
        kmers = Kmers.read(folder, 40)
        assert kmers == Kmers(3, 1, vocabulary, 40)
        text = letters(50, 1)[:20] + "N" + letters(50, 2)
        words = " ".join(text[i : i + 3] for i in range(len(text) - 2))
        (folder / "config.json").write_text('{"model_type": "bert"}')
        stock = AutoTokenizer.from_pretrained(folder)(words, truncation=True)
        assert stock["input_ids"] == kmers.encode(text)
        assert stock["input_ids"].count(1) == 3  # the words with N


def test_other_vocabularies_are_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "hello", "cat"]))
    with pytest.raises(InputError, match="is no k-mer model"):
        Kmers.read(tmp_path, 64)


def test_values_of_tokens_become_values_of_nucleotides():
    kmers = Kmers.new(3)
    found = kmers.to_nucleotides(np.array([3.0, 6.0, 0.0]), 6)
    assert found.tolist() == [3.0, 4.5, 3.0, 3.0, 0.0, 0.0]


# ------------------------------------------------------------------------------------------------ reading frames


def by_hand(sequence: str, strands: str) -> str | None:
    """The rule word for word: codon by codon, six frames, the first longest."""
    best = None
    for strand in [sequence, reverse_complement(sequence)][: 2 if strands == "both" else 1]:
        for frame in range(3):
            position = frame
            while position + 3 <= len(strand):
                if strand[position : position + 3] != "ATG":
                    position += 3
                    continue
                end = position
                while end < len(strand):
                    codon = strand[end : end + 3]
                    if set(codon) - set("ACGT"):
                        break
                    end += len(codon)
                    if codon in ("TAA", "TAG", "TGA"):
                        break
                if best is None or end - position > len(best):
                    best = strand[position:end]
                position = max(end, position + 3)
    return best


@given(st.text("ACGTAGTN", max_size=120), st.sampled_from(["forward", "both"]))
def test_longest_orf_is_the_rule_word_for_word(sequence, strands):
    found = longest_orf(sequence, strands)
    assert (found.of(sequence) if found else None) == by_hand(sequence, strands)


def test_orfs_made_by_hand():
    assert longest_orf("CCCTTTCCC") is None
    assert longest_orf("CCATGAAATAACC") == Orf(2, 11)
    assert longest_orf("CCATGAAACC") == Orf(2, 10, complete=False)  # no stop: a last incomplete codon belongs to it
    assert longest_orf("ATGAAATAGATGCCCTAG") == Orf(0, 9)  # two equal: the first
    assert longest_orf("ATGAAANAATAG") == Orf(0, 6, complete=False)
    reverse = reverse_complement("GGATGAAATAAGG")
    assert longest_orf(reverse) is None
    back = longest_orf(reverse, "both")
    assert back == Orf(2, 11, "-")
    assert back.of(reverse) == "ATGAAATAA"
    assert back.place(len(reverse)) == (3, 11)
    assert longest_orf("CCATGAAATAACC").frame == 3


# ------------------------------------------------------------------------------------------------ masked spans


def test_spans_are_hidden():
    """About the share that is asked for, whole spans, no special token, and mostly as [MASK]."""
    for k, stride in ((3, 1), (6, 1), (3, 3)):
        kmers = Kmers.new(k, stride, 200)
        ids = torch.tensor([kmers.encode(letters(700, row)) for row in range(64)])
        shown, labels = mask_spans(ids, kmers, 0.15, torch.Generator().manual_seed(0))
        hidden = labels != IGNORED
        assert float(hidden.float().mean()) == pytest.approx(0.14, abs=0.015)
        assert torch.equal(labels[hidden], ids[hidden])
        assert torch.equal(shown[~hidden], ids[~hidden])
        assert not hidden[:, [0, -1]].any()
        assert float((shown[hidden] == 4).float().mean()) == pytest.approx(0.8, abs=0.05)
        least = len(neighbours(k, stride)) + 1
        for row in hidden[:, 10:-10].tolist():
            runs = [len(list(run)) for value, run in itertools.groupby(row) if value]
            assert all(run >= least for run in runs[1:-1])


def test_no_hidden_letter_is_told_by_a_visible_neighbour():
    """The reason for spans: of k = 3 the hidden centre's middle letter is in no visible token."""
    assert neighbours(3, 1) == (-1, 1)
    assert neighbours(3, 3) == ()
    assert neighbours(3, 2) == (-1, 1)
    assert neighbours(8, 1) == (-7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7)
