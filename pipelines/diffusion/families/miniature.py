"""Small random parts for the families' miniature pipelines, without downloads or files.

Shapes are the smallest that still have every kind of layer an adapter can meet (several blocks, attention with
several transformer layers, resnets, samplers, text encoders, double and single stream blocks).
"""

from __future__ import annotations

from typing import Any


def make(name: str, /, *args: Any, **values: Any) -> Any:
    """An object of diffusers' or transformers' class ``name``; a network is in evaluation mode."""
    import diffusers
    import transformers
    from torch import nn

    kind = getattr(diffusers, name, None) or getattr(transformers, name)
    made = kind(*args, **values)
    return made.eval() if isinstance(made, nn.Module) else made


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(words: tuple[str, ...] = ()) -> Any:
    """A CLIP tokenizer with one token per letter (16 per prompt), and ``words`` as whole tokens."""
    symbols = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *".,<>!", *(f"{mark}</w>" for mark in ".,<>!")]
    vocab = {symbol: index for index, symbol in enumerate([*symbols, START, END])}
    tokenizer = make("CLIPTokenizer", vocab=vocab, merges=[], model_max_length=16)
    tokenizer.add_tokens(list(words))
    return tokenizer


def t5_tokenizer() -> Any:
    """A T5 tokenizer with one token per letter."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -2.0) for letter in LETTERS)]
    return make("T5Tokenizer", vocab=vocab, extra_ids=0, model_max_length=16)


def clip_config(width: int = 16, **changes: Any) -> Any:
    """Configuration of a two-layer CLIP text encoder for :func:`clip_tokenizer`."""
    tokenizer = clip_tokenizer()
    values = {
        "vocab_size": len(tokenizer) + 8,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "projection_dim": width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return make("CLIPTextConfig", **(values | changes))


def vae(latent_channels: int = 4, **changes: Any) -> Any:
    """An autoencoder with factor 2: a 32-pixel picture has 16 x 16 latents."""
    return make(
        "AutoencoderKL",
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=32,
        **changes,
    )


def unet(**changes: Any) -> Any:
    """A UNet with two levels and cross-attention (SD's names)."""
    values = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return make("UNet2DConditionModel", **(values | changes))


def ddim() -> Any:
    """Stable Diffusion's noise schedule with a deterministic single-step solver."""
    return make(
        "DDIMScheduler",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )


def t5() -> Any:
    """A two-layer T5 encoder for :func:`t5_tokenizer`."""
    config = make("T5Config", vocab_size=len(t5_tokenizer()), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return make("T5EncoderModel", config)


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's template of a conversation, without tools and thoughts."""


def qwen_tokenizer() -> Any:
    """A Qwen tokenizer with one token per letter and a chat template."""
    symbols = [*LETTERS, *".,<>!", "Ġ", "Ċ"]
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocab = {symbol: index for index, symbol in enumerate([*symbols, *special])}
    tokenizer = make("Qwen2Tokenizer", vocab=vocab, merges=[], extra_special_tokens=list(special[1:]))
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3(width: int = 32) -> Any:
    """A three-layer Qwen3 language model without head, for :func:`qwen_tokenizer`."""
    config = make(
        "Qwen3Config",
        vocab_size=len(qwen_tokenizer()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=width // 2,
        max_position_embeddings=1024,
    )
    return make("Qwen3Model", config)


def quiet(pipe: Any) -> Any:
    """``pipe`` without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
