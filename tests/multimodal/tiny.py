"""Tiny random vision-language models on disk, with processors that spell bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)

from assets.build.vlm import TEMPLATE
from tests.language import tiny

VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 8}  # fmt: skip


def spelling(*more: str) -> Any:
    """One token per byte, and <image> as one token."""
    made = tiny.tokenizer(template=False)
    made.add_special_tokens({"extra_special_tokens": ["<image>", *more]})
    return made


def words(vocabulary: int, end: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=end, pad_token_id=0,
    )  # fmt: skip


def llava(folder: Path, seed: int = 0) -> Path:
    """A LLaVA 1.5: CLIP without its first token, two layers of Llama."""
    torch.manual_seed(seed)
    tokens = spelling()
    image = tokens.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=words(len(tokens), tokens.eos_token_id),
        image_token_index=image, image_seq_length=4,
    )  # fmt: skip
    pixels = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        pixels, tokens, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    return _saved(LlavaForConditionalGeneration(config), processor, folder)


def llava_next(folder: Path) -> Path:
    """A LLaVA-NeXT, which cuts large pictures into several: the number of tokens depends on the picture."""
    torch.manual_seed(1)
    from transformers import LlavaNextImageProcessor

    tokens = spelling()
    grid = [[16, 32], [32, 16], [32, 32]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=words(len(tokens), tokens.eos_token_id),
        image_token_index=tokens.convert_tokens_to_ids("<image>"), image_grid_pinpoints=grid,
    )  # fmt: skip
    pixels = LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=grid
    )
    processor = LlavaNextProcessor(
        pixels, tokens, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    return _saved(LlavaNextForConditionalGeneration(config), processor, folder)


def idefics3(folder: Path) -> Path:
    """An Idefics3 (SmolVLM's family): its language model is called text_model."""
    torch.manual_seed(2)
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    tokens = spelling("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    image = tokens.convert_tokens_to_ids("<image>")
    config = Idefics3Config(
        vision_config=dict(VISION), text_config=words(len(tokens), tokens.eos_token_id).to_dict(),
        image_token_id=image, scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    pixels = Idefics3ImageProcessor(size={"longest_edge": 16}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(pixels, tokens, image_seq_len=1, chat_template=TEMPLATE)
    return _saved(Idefics3ForConditionalGeneration(config), processor, folder)


def _saved(model: Any, processor: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
