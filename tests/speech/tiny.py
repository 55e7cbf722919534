"""A tiny random Whisper on disk, with a tokenizer that spells bytes, and sounds that need no recording."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from pipelines.speech.audio import RATE

WINDOW = 2
"""Seconds that the tiny model hears."""

SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>")
LANGUAGES = ("<|en|>", "<|fr|>", "<|transcribe|>", "<|translate|>")


def tokenizer_file(folder: Path, multilingual: bool = False) -> tuple[Path, dict[str, int]]:
    """One token per byte, the special ones, and times in steps of 0.02 s."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [*SPECIAL[:2], *(LANGUAGES if multilingual else ()), *SPECIAL[2:]]
    special += [f"<|{step * 0.02:.2f}|>" for step in range(1501)]
    vocab = {token: number for number, token in enumerate(letters)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json", made.get_vocab()


def whisper(folder: Path, multilingual: bool = False, seed: int = 0, window: int = WINDOW) -> Path:
    """A directory as transformers writes it: two layers a side, width 16."""
    folder.mkdir(parents=True, exist_ok=True)
    file, ids = tokenizer_file(folder, multilingual)
    from transformers import WhisperTokenizerFast

    tokenizer: Any = WhisperTokenizerFast(tokenizer_file=str(file), model_max_length=64)
    torch.manual_seed(seed)
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    config = WhisperConfig(
        vocab_size=len(ids), d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=80,
        max_source_positions=50 * window, max_target_positions=64, pad_token_id=end, bos_token_id=end,
        eos_token_id=end, decoder_start_token_id=start,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    told: dict[str, Any] = {
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start,
        "no_timestamps_token_id": ids["<|notimestamps|>"], "prev_sot_token_id": ids["<|startofprev|>"],
        "is_multilingual": multilingual, "max_initial_timestamp_index": 50, "max_length": 64,
        "return_timestamps": False,
    }  # fmt: skip
    if multilingual:
        told |= {"lang_to_id": {name: ids[name] for name in LANGUAGES[:2]},
                 "task_to_id": {name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")}}  # fmt: skip
    model.generation_config = GenerationConfig(**told)
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(chunk_length=window), tokenizer).save_pretrained(folder)
    return folder


def tone(seconds: float = 1.0, pitch: float = 440.0, rate: int = RATE) -> np.ndarray:
    """A sine of half the full scale."""
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    """Samples (n,) or (n, channels) as 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


WORDS = ("one", "two", "three", "four")


def utterances(folder: Path, count: int = 8, seconds: float = 1.0) -> Path:
    """Tones named by their pitch: ``rows.jsonl`` with ``audio`` and ``text``, the sounds beside it."""
    rows = []
    for number in range(count):
        word = number % len(WORDS)
        samples = tone(seconds, 300.0 * (word + 1)) * (0.6 + 0.4 * number / count)
        write_wav(folder / "sounds" / f"{number}.wav", samples)
        rows.append({"audio": f"sounds/{number}.wav", "text": WORDS[word]})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
