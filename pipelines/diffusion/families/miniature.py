"""Small random parts for the families' miniature pipelines, without downloads or files.

Shapes are the smallest that still have every kind of layer an adapter can meet (several blocks, attention with
several transformer layers, resnets, samplers, text encoders, double and single stream blocks).
"""

from __future__ import annotations

from collections.abc import Mapping
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


def vae(latent_channels: int = 4, levels: int = 2, **changes: Any) -> Any:
    """An autoencoder with factor 2: a 32-pixel picture has 16 x 16 latents (a quarter with each level more)."""
    return make("AutoencoderKL", **vae_values(latent_channels, levels), **changes)


def vae_values(latent_channels: int = 4, levels: int = 2) -> dict[str, Any]:
    """Configuration of :func:`vae`, without statistics of latents."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (8,) * (levels - 1) + (16,),
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "norm_num_groups": 4,
        "sample_size": 32,
    }


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


def t5(kind: str = "T5") -> Any:
    """A two-layer encoder for :func:`t5_tokenizer`: "T5" or "UMT5"."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return make(f"{kind}EncoderModel", make(f"{kind}Config", vocab_size=len(t5_tokenizer()), **sizes))


def video_vae(z_dim: int = 4) -> Any:
    """Qwen-Image's autoencoder, which takes pictures as single frames, with factor 2."""
    return make(
        "AutoencoderKLQwenImage",
        base_dim=8,
        z_dim=z_dim,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.75, 0.25, 0.1, -0.2][:z_dim],
        latents_std=[2.8, 1.5, 0.8, 1.2][:z_dim],
    )


QWEN_WORDS = (
    "system Describe the image by detailing color shape size texture quantity text spatial relationships of objects "
    "and background user assistant key features input then explain how should alter or modify Generate a new that "
    "meets requirements while maintaining consistency with original where appropriate instruction"
)
"""Words of the templates in which pipelines put a prompt for Qwen; each is one token, as in the real vocabulary."""

QWEN_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

LANGUAGE_WIDTH = 8
"""Width of the miniature language models that read prompts; they have many layers, of which some are read."""

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's template of a conversation, without tools and thoughts."""


INSTRUCTION = (
    "{% for message in messages %}{{ '[SYSTEM_PROMPT]' if message.role == 'system' else '[INST]' }}"
    "{% for part in message.content %}{{ part.text if part.type == 'text' else '[IMG]' }}{% endfor %}"
    "{{ '[/SYSTEM_PROMPT]' if message.role == 'system' else '[/INST]' }}{% endfor %}"
)
"""Mistral's."""


def qwen_tokenizer() -> Any:
    """A Qwen tokenizer with a token per letter and per word of the templates."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {piece: number for number, piece in enumerate([*sorted(ByteLevel.alphabet()), "<|endoftext|>"])}
    tokenizer = make("Qwen2Tokenizer", vocab=vocab, merges=[], model_max_length=2048)
    words = QWEN_WORDS.split()
    tokenizer.add_tokens([*(f" {word}" for word in words), "system", "Describe", "user", "assistant", "'s"])
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_MARKS)})
    tokenizer.chat_template = CHAT
    return tokenizer


def marked_tokenizer(*marks: str, side: str = "right", longest: int = 1024) -> Any:
    """A tokenizer of a language model with one token per letter, which puts ``marks`` before every text and pads on
    this ``side``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = {symbol: index for index, symbol in enumerate(["<pad>", *marks, "<unk>", "▁", *LETTERS, *".,<>!"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(
        single=" ".join([*marks, "$A"]), special_tokens=[(mark, vocab[mark]) for mark in marks]
    )
    return make(
        "PreTrainedTokenizerFast", tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token=marks[-1],
        padding_side=side, model_max_length=longest,
    )  # fmt: skip


def language_model(kind: str, tokenizer: Any, width: int = 32, **changes: Any) -> Any:
    """A three-layer language model without head: ``kind`` is "Gemma2", "Glm" ..."""
    config = make(
        f"{kind}Config",
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=width // 2,
        max_position_embeddings=4096,
        **changes,
    )
    return make(f"{kind}Model", config)


def qwen_vl(width: int = 32, **changes: Any) -> Any:
    """A two-layer Qwen2.5-VL, which reads text and pictures, for :func:`qwen_tokenizer`."""
    config = _qwen_config("Qwen2_5_VLConfig", width, changes, {"fullatt_block_indexes": [0]})
    return make("Qwen2_5_VLForConditionalGeneration", config)


def qwen3_vl(width: int = 32) -> Any:
    """A two-layer Qwen3-VL without head, for :func:`qwen_tokenizer`."""
    vision = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return make("Qwen3VLModel", _qwen_config("Qwen3VLConfig", width, {"head_dim": width // 2}, vision))


def _qwen_config(kind: str, width: int, text: Mapping[str, Any], vision: Mapping[str, Any]) -> Any:
    """A configuration of class ``kind`` for :func:`qwen_tokenizer`; ``text`` and ``vision`` are what differs."""
    tokenizer = qwen_tokenizer()
    ids = dict(zip(QWEN_MARKS, tokenizer.convert_tokens_to_ids(list(QWEN_MARKS)), strict=True))
    language = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
    }
    seeing = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width}
    return make(
        kind,
        text_config={**language, **text},
        vision_config={**seeing, **vision},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


class QwenReader:
    """Prepares pictures and text for :func:`qwen_vl` as transformers' Qwen2VLProcessor, which needs torchvision."""

    def __init__(self) -> None:
        self.tokenizer = qwen_tokenizer()
        size = {"shortest_edge": 28 * 28, "longest_edge": 4 * 28 * 28}
        self.pictures = make("Qwen2VLImageProcessorPil", size=size)

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> Any:
        """Token ids and patches; every mark for a picture becomes one per four patches."""
        found = self.pictures(images=images, return_tensors=return_tensors)
        counts = [int(grid.prod()) // 4 for grid in found["image_grid_thw"]]
        pad = QWEN_MARKS[4]
        parts = [line.split(pad) for line in text]
        filled = ["".join(a + pad * n for a, n in zip(line, [*counts, 0], strict=True)) for line in parts]
        found.update(self.tokenizer(filled, padding=padding, return_tensors=return_tensors))
        return found


def llama_tokenizer() -> Any:
    """The same tokenizer, with a token before every text as Llama's has."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = qwen_tokenizer()
    start = QWEN_MARKS[0]
    marks = [(start, tokenizer.convert_tokens_to_ids(start))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=marks)
    return tokenizer


def llama(width: int = 32) -> Any:
    """A two-layer Llama for :func:`qwen_tokenizer`."""
    tokenizer = qwen_tokenizer()
    config = make(
        "LlamaConfig",
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        attn_implementation="eager",  # the pipeline asks for attention maps
    )
    return make("LlamaForCausalLM", config)


def mistral_tokenizer() -> Any:
    """Mistral's tokenizer with one token per letter and a chat template of texts and pictures."""
    special = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]")
    names = ("<unk>", "<s>", "</s>", "<pad>", *special)
    vocab = {symbol: index for index, symbol in enumerate([*names, "▁", *LETTERS, *".,<>!"])}
    tokenizer = make("LlamaTokenizer", vocab=vocab, merges=[], pad_token="<pad>", extra_special_tokens=list(special))
    tokenizer.chat_template = INSTRUCTION
    return tokenizer


def _language(layers: int, tokenizer: Any) -> dict[str, Any]:
    """Configuration of a small language model."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": LANGUAGE_WIDTH,
        "intermediate_size": LANGUAGE_WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": LANGUAGE_WIDTH,
    }


def chat_model(layers: int) -> Any:
    """A Qwen3 for :func:`qwen_tokenizer`."""
    return make("Qwen3ForCausalLM", make("Qwen3Config", **_language(layers, qwen_tokenizer())))


def mistral(layers: int) -> Any:
    """A Mistral 3, which reads text and pictures, for :func:`mistral_tokenizer`."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = make(
        "Mistral3Config",
        text_config={"model_type": "mistral", **_language(layers, mistral_tokenizer())},
        vision_config={"model_type": "pixtral", **vision, "image_size": 32, "patch_size": 16},
        image_token_index=8,
    )
    return make("Mistral3ForConditionalGeneration", config)


def quiet(pipe: Any) -> Any:
    """``pipe`` without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
