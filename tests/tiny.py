"""Tiny random pipelines of every family, built from configurations alone: no download, no file.

Shapes are the smallest that still have every kind of layer an adapter can meet (several blocks, attention with
several transformer layers, resnets, samplers, text encoders, double and single stream blocks). Weights are random
but reproducible: ``seed`` decides them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(words: tuple[str, ...] = ()) -> CLIPTokenizer:
    """A CLIP tokenizer that spells words letter by letter (16 tokens a prompt), with ``words`` as whole tokens."""
    symbols = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *".,<>!", *(f"{mark}</w>" for mark in ".,<>!")]
    vocab = {symbol: index for index, symbol in enumerate([*symbols, START, END])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)
    tokenizer.add_tokens(list(words))
    return tokenizer


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that spells words letter by letter."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -2.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=16)


def clip_config(width: int = 16, **changes: Any) -> CLIPTextConfig:
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
    return CLIPTextConfig(**(values | changes))


def vae(latent_channels: int = 4, **changes: Any) -> AutoencoderKL:
    """An autoencoder with factor 2: a 32-pixel picture has 16 x 16 latents."""
    return AutoencoderKL(
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
    ).eval()


def unet(**changes: Any) -> UNet2DConditionModel:
    """A UNet with two levels, cross-attention on both and in the middle (SD names)."""
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
    return UNet2DConditionModel(**(values | changes)).eval()


def ddim() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with a deterministic single-step solver."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def sd(seed: int = 0, **unet_changes: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x in miniature."""
    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        unet=unet(**unet_changes),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _quiet(pipe)


def sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL in miniature: two text encoders, pooled embeddings, size conditioning."""
    torch.manual_seed(seed)
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(24, projection_dim=16, hidden_act="gelu")).eval(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=16 + 24,
            transformer_layers_per_block=(1, 2),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=ddim(),
        add_watermarker=False,
    )
    return _quiet(pipe)


def sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 in miniature: joint attention, two CLIP encoders and T5, flow matching."""
    torch.manual_seed(seed)
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=16,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()).eval(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(),
        tokenizer_3=t5_tokenizer(),
    )
    return _quiet(pipe)


def flux(seed: int = 0, guidance_embeds: bool = True) -> FluxPipeline:
    """Flux in miniature: double and single stream blocks, packed latents, guidance as an embedding."""
    torch.manual_seed(seed)
    pipe = FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=guidance_embeds,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=t5_tokenizer(),
    )
    return _quiet(pipe)


FAMILIES = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux}
"""Family name -> builder."""


def saved(family: str, folder: Path, seed: int = 0) -> Path:
    """Write the tiny pipeline of a family in diffusers' directory format and return its path."""
    path = folder / f"tiny-{family}-{seed}"
    FAMILIES[family](seed).save_pretrained(path)
    return path


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer()), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ).eval()


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lora_file(
    pipe: Any,
    folder: Path,
    seed: int = 1,
    rank: int = 2,
    alpha: float = 4.0,
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0"),
    text_targets: tuple[str, ...] = ("q_proj", "v_proj"),
    strength: float = 0.5,
    **lora_config: Any,
) -> Path:
    """Save a random LoRA for ``pipe`` as a trainer does: PEFT layers, written by diffusers' own saver.

    ``targets`` are module name endings in the denoiser, ``text_targets`` in ``text_encoder`` (empty = none). The
    pipeline is not changed (the layers are made on copies). Returns the written ``.safetensors`` file.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, Any] = {}
    models: dict[str, Any] = {}
    for name, wanted in {denoiser_name(pipe): targets, "text_encoder": text_targets}.items():
        if not wanted:
            continue
        models[name] = model = copy.deepcopy(getattr(pipe, name))
        model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(wanted), **lora_config))
        for key, parameter in model.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = noise * strength / parameter[0].numel() ** 0.5
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
    pipe.save_lora_weights(folder, **layers, **_collate_lora_metadata(models))
    return folder / "pytorch_lora_weights.safetensors"


def denoiser_name(pipe: Any) -> str:
    """``unet`` or ``transformer``."""
    return "unet" if hasattr(pipe, "unet") else "transformer"
