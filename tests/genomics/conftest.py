"""Small models of k-mers, made with stock transformers, and random transcripts."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from studio.training.schemas.rna import TrainRnaConfig

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


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path_factory.getbasetemp() / "genomics-home"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def two(tmp_path_factory) -> list[str]:
    """Non-coding and coding transcripts that differ in their letters, two of each gene, as LABEL=FILE."""
    folder = tmp_path_factory.mktemp("two")
    nc = {f"n{i} gene=N{i // 2}": letters(100 + i, i, "AATTCG") for i in range(20)}
    coding = {f"m{i} gene=M{i // 2}": f"CATG{letters(120 + 3 * i, 50 + i, 'CCGGA')}TAA" for i in range(16)}
    files = {"lncRNA": write_fasta(folder / "nc.fa", nc), "mRNA": write_fasta(folder / "coding.fa", coding)}
    return [f"{label}={file}" for label, file in files.items()]


def settings(base: Path | str, data: list[str], **changes: object) -> TrainRnaConfig:
    """A short run on a small base."""
    values: dict[str, object] = {
        "base": str(base), "data": data, "device": "cpu", "steps": 4, "batch_size": 4, "learning_rate": 1e-2,
        "checkpoint_every": 0, "save_every": 0, "warmup_ratio": 0.0, "name": "little",
    }  # fmt: skip
    if changes.get("mode") != "full":
        values |= {"rank": 2, "alpha": 4, "dropout": 0.0}
    return TrainRnaConfig.parse(values | changes)
