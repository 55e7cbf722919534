"""The tokenizer and the text encoder of the base model, both of CLIP's kind and built from scratch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import assets
from adapters.files import write_text
from assets.build import data
from assets.build.common import build_dir

LENGTH = 40
"""Tokens per caption, begin and end included."""

MERGES = 1500
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END = "</w>"


def general_words(modules: Path) -> list[str]:
    """Return English words from the labels and tags of all emoji, lower case, without held-out subjects."""
    entries = json.loads((modules / "emojibase-data" / "en" / "data.json").read_text("utf-8"))
    phrases = (phrase for e in entries for phrase in (e["label"], *e.get("tags", ())))
    words = (word.strip(".,:;()“”’'!?").lower() for phrase in phrases for word in phrase.split())
    held = {word for name in data.HELD_CONCEPTS for word in name.split()}
    return [word for word in words if word.isalpha() and word.isascii() and word not in held]


def corpus(modules: Path) -> Counter[str]:
    """Return word counts: captions of 20,000 scenes, and every general word once per use."""
    rng = np.random.default_rng(5)
    counts = Counter(general_words(modules))
    for _ in range(20_000):
        counts.update(data.sample_scene(rng, (1, 1, 0.3)).caption.replace(",", " , ").split())
    return counts


def train_bpe(counts: Iterable[tuple[str, int]], merges: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn byte-pair merges from (word, count) pairs, in CLIP's layout.

    Returns the vocabulary (256 bytes, the same with the end-of-word mark, one entry per merge, begin
    and end of text) and the merges in order.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix=END))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges, end_of_word_suffix=END, initial_alphabet=alphabet, show_progress=False
    )
    words = [word for word, count in sorted(counts) for _ in range(count)]
    learner.train_from_iterator(words, trainer)
    learned = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:merges]
    tokens = [*alphabet, *(letter + END for letter in alphabet), *dict.fromkeys(a + b for a, b in learned)]
    return {token: index for index, token in enumerate([*tokens, BOS, EOS])}, learned


def new_tokenizer(modules: Path) -> CLIPTokenizer:
    """Build the tokenizer: whole words for what captions use, pieces for everything else."""
    vocabulary, merges = train_bpe(corpus(modules).items(), MERGES)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save in today's form and as ``vocab.json`` + ``merges.txt``, which older versions read."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    write_text(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *lines]) + "\n")


@lru_cache(maxsize=1)
def tokenizer() -> CLIPTokenizer:
    """Return the tokenizer from the build folder, else the shipped model's, else a newly built one."""
    folder = build_dir() / "tokenizer"
    shipped = Path(assets.__file__).parent / "models" / "tinymoji" / "tokenizer"
    if not (folder / "merges.txt").is_file():
        if (shipped / "merges.txt").is_file():
            return CLIPTokenizer.from_pretrained(shipped)
        save_tokenizer(new_tokenizer(data.fetch_packages(build_dir())), folder)
    return CLIPTokenizer.from_pretrained(folder)


def encode(captions: list[str]) -> np.ndarray:
    """Return int64 token ids ``(len(captions), LENGTH)``, padded with the end token and cut to length."""
    ids = tokenizer()(captions, padding="max_length", truncation=True, max_length=LENGTH)["input_ids"]
    return np.asarray(ids, np.int64)


def new_text_encoder(vocabulary: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained CLIP text encoder, 3 layers of width 192, for this tokenizer's ids."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=LENGTH,
            hidden_act="gelu",
            projection_dim=192,
            bos_token_id=vocabulary.bos_token_id,
            eos_token_id=vocabulary.eos_token_id,
            pad_token_id=vocabulary.pad_token_id,
        )
    )
