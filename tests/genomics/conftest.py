"""Small models of k-mers, made with stock transformers, and random transcripts."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

WORDS = {k: ["".join(letters) for letters in itertools.product("ATCG", repeat=k)] for k in (3, 4, 6)}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def letters(length: int, seed: int, among: str = "ACGT") -> str:
    return "".join(random.Random(seed).choices(among, k=length))


def write_fasta(file: Path, records: dict[str, str], width: int = 60) -> Path:
    """Records as text, their sequences wrapped."""
    lines = []
    for header, sequence in records.items():
        lines += [f">{header}", *(sequence[i : i + width] for i in range(0, len(sequence), width))]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def save(folder: Path, kind: type, k: int = 3, positions: int = 64, seed: int = 0, **more: object) -> Path:
    """A random BERT with a DNABERT vocabulary, as stock transformers write it, and the tokenizer's files by hand."""
    torch.manual_seed(seed)
    model = kind(BertConfig(vocab_size=4**k + 5, max_position_embeddings=positions, **SMALL, **more))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS[k]]) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": False, "tokenizer_class": "BertTokenizer"})
    )
    return folder


@pytest.fixture(scope="session")
def masked(tmp_path_factory) -> Path:
    """A base that has learnt hidden k-mers only."""
    return save(tmp_path_factory.mktemp("masked") / "base", BertForMaskedLM)


@pytest.fixture(scope="session")
def classified(tmp_path_factory) -> Path:
    """A base with a classifier."""
    return save(tmp_path_factory.mktemp("classified") / "base", BertForSequenceClassification, seed=1)
