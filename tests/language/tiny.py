"""Tiny random language models on disk, with a tokenizer that spells bytes and a chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from studio.datasets.encoding import CHATML

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<mask>")


def tokenizer(template: bool = True, frame: bool = False, backwards: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte; ``frame``: <s> and </s> around a text as in BERT; ``backwards`` numbers bytes downwards."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=backwards)
    vocab = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if frame:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>" if template else "</s>",
        mask_token="<mask>", cls_token="<s>", sep_token="</s>", additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    found.chat_template = CHATML if template else None
    return found


def llama(
    folder: Path, seed: int = 0, template: bool = True, hidden: int = 32, backwards: bool = False, **changes: object
) -> Path:  # fmt: skip
    """A Llama of two layers."""
    torch.manual_seed(seed)
    spelling = tokenizer(template, backwards=backwards)
    values: dict[str, object] = {
        "vocab_size": len(spelling), "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": spelling.eos_token_id, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    return _saved(LlamaForCausalLM(LlamaConfig(**(values | changes))), spelling, folder)


def gpt2(folder: Path, seed: int = 0) -> Path:
    """A GPT-2 of two layers (its layers keep their weights transposed)."""
    torch.manual_seed(seed)
    spelling = tokenizer(template=False)
    config = GPT2Config(vocab_size=len(spelling), n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1,
                        eos_token_id=2)  # fmt: skip
    return _saved(GPT2LMHeadModel(config), spelling, folder)


def bert(folder: Path, seed: int = 0) -> Path:
    """A BERT of two layers."""
    torch.manual_seed(seed)
    spelling = tokenizer(template=False, frame=True)
    config = BertConfig(vocab_size=len(spelling), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0)  # fmt: skip
    return _saved(BertForMaskedLM(config), spelling, folder)


def _saved(model: object, spelling: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    spelling.save_pretrained(folder)
    return folder
