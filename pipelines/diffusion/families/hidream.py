"""HiDream-I1: double and single stream blocks with routed experts, flow matching. Text is T5's tokens, those of every
layer of Llama 3, and pooled CLIP text twice.

Cai et al. 2025, "HiDream-I1: A High-Efficient Image Generative Foundation Model with Sparse Diffusion Transformer"
(arXiv 2505.22705). The denoiser predicts x0 - noise, so the pipeline negates it. The pipeline changes a picture's size
to the area of the base's own pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.diffusion.families.base import (
    Denoiser,
    Encoding,
    Family,
    Layout,
    Signature,
    Tensors,
    latent_factor,
    repeat,
)

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 128
"""Tokens of T5 and of Llama that diffusers' pipeline reads by default."""

BLOCK = r"(double|single)_stream_blocks\.\d+\.block"
ATTENTION = r"attn1\.to_(q|k|v|out)(_t)?"
FEED_FORWARD = r"ff_[it]\.((shared_experts|experts\.\d+)\.)?w[123]"

LLAMA = "encoder_hidden_states_llama3"


class HiDream(Family):
    """HiDream-I1 (Full, Dev, Fast). Its text encoders are not trained here."""

    name = "hidream"
    title = "HiDream-I1"
    short = "HiDream"
    order = 80
    licence = "MIT; its Llama 3.1 has a license of its own"
    pipeline = "HiDreamImagePipeline"
    single_file = False
    components = ("vae", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    denoisers = (Denoiser("transformer"),)
    text_encoders = ()
    batch_arguments = ("hidden_states", "timesteps", "encoder_hidden_states_t5", "pooled_embeds")
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {
        ("encoder_hidden_states_t5",): "t5",
        (LLAMA,): "llama3",
        ("pooled_embeds",): "pooled",
    }
    call_names: ClassVar[Mapping[str, str]] = {
        "t5": "prompt_embeds_t5",
        "llama3": "prompt_embeds_llama3",
        "pooled": "pooled_prompt_embeds",
    }
    batch_axes: ClassVar[Mapping[str, int]] = {"llama3": 1}
    targets: ClassVar[Mapping[str, str]] = {
        "attention": rf"{BLOCK}\.{ATTENTION}",
        "attention-mlp": rf"{BLOCK}\.({ATTENTION}|{FEED_FORWARD})",
        "linear": rf"{BLOCK}\.({ATTENTION}|{FEED_FORWARD}|adaLN_modulation\.1)",
        "all": rf"{BLOCK}\.({ATTENTION}|{FEED_FORWARD}|adaLN_modulation\.1)",
    }
    layout = Layout(("image", "text"), patch=2)
    text_tensors = ("t5", "llama3")
    predictions = ("flow",)
    inner_regions = False
    no_inner_regions = ", because its experts get the tokens of picture and text in no order"
    vae_fields = ("shift_factor",)
    prompt_tokens = TOKENS
    training_shift = 3.0
    signature = Signature(
        adapter=r"(double|single)_stream_blocks[._]\d+[._]block",
        checkpoint=r"(^|\.)(double|single)_stream_blocks\.\d+\.block\.",
        hints=r"hidream",
        precedence=8,
    )

    def resolution(self, pipe: Any) -> int:
        return int(pipe.default_sample_size) * latent_factor(pipe)

    def drawn_size(self, pipe: Any, height: int, width: int) -> tuple[int, int]:
        step = self.pixel_step(pipe)
        scale = math.sqrt((pipe.default_sample_size * pipe.vae_scale_factor) ** 2 / (width * height))
        return int(height * scale // step * step), int(width * scale // step * step)

    def timetable(self, pipe: Any, steps: int, size: tuple[int, int]) -> dict[str, Any]:
        usual: dict[str, Any] = {"num_inference_steps": steps}
        if pipe.scheduler.config.get("use_dynamic_shifting"):
            tokens = pipe.transformer.max_seq  # the pipeline uses diffusers' usual line, whatever the picture's size
            usual["mu"] = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        return usual

    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        found = pipe.encode_prompt(
            prompt,
            negative_prompt=negative,
            device=pipe._execution_device,
            num_images_per_prompt=images,
            do_classifier_free_guidance=guided,
        )
        return self.encoding(_named(*found[::2]), _named(*found[1::2]) if guided else {}, guided)

    def condition(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        import torch

        with torch.no_grad():
            return _named(*pipe.encode_prompt(list(texts), do_classifier_free_guidance=False)[::2])

    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        predicted = denoiser(
            hidden_states=noisy,
            timesteps=times.to(noisy.dtype) * 1000,
            encoder_hidden_states_t5=given["t5"].to(noisy.dtype),
            encoder_hidden_states_llama3=given["llama3"].to(noisy.dtype).movedim(0, 1),
            pooled_embeds=given["pooled"].to(noisy.dtype),
            return_dict=False,
        )[0]
        return -predicted if predicted.shape == noisy.shape else -_assembled(predicted, noisy.shape)

    def repeat(self, name: str, value: Any, count: int, batch: int) -> Any:
        if name == LLAMA:
            return repeat(value.movedim(1, 0), count, batch).movedim(0, 1)
        return super().repeat(name, value, count, batch)

    def most_together(self, pipe: Any) -> int | None:
        return 1  # an expert gets the tokens of all samples, in no order

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        values = {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": [32, 32],
            "text_emb_dim": 32,
            "num_routed_experts": 3,
            "num_activated_experts": 2,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (16, 16),
            "llama_layers": [0, 1],
        }
        clip = miniature.clip_config(max_position_embeddings=TOKENS)
        transformer = miniature.make("HiDreamImageTransformer2DModel", **(values | changes))
        pipe = miniature.make(
            "HiDreamImagePipeline",
            scheduler=miniature.make("FlowMatchEulerDiscreteScheduler", shift=3.0),
            vae=miniature.vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=miniature.make("CLIPTextModelWithProjection", clip),
            tokenizer=miniature.clip_tokenizer(),
            text_encoder_2=miniature.make("CLIPTextModelWithProjection", clip),
            tokenizer_2=miniature.clip_tokenizer(),
            text_encoder_3=miniature.t5(),
            tokenizer_3=miniature.t5_tokenizer(),
            text_encoder_4=miniature.llama(),
            tokenizer_4=miniature.llama_tokenizer(),
            transformer=transformer,
        )
        pipe.default_sample_size = 16
        return miniature.quiet(pipe)


def _named(t5: Tensor, llama: Tensor, pooled: Tensor) -> Tensors:
    """The pipeline's encoding, with the batch in front of Llama's layers."""
    return {"t5": t5, "llama3": llama.movedim(1, 0), "pooled": pooled}


def _assembled(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Latents of this shape from the tokens (batch, channels, tokens, 4) that the denoiser returns in training."""
    rows, columns = shape[2] // 2, shape[3] // 2
    grid = tokens[:, :, : rows * columns].reshape(*shape[:2], rows, columns, 2, 2)
    return grid.permute(0, 1, 2, 4, 3, 5).reshape(*shape)


FAMILY = HiDream()
