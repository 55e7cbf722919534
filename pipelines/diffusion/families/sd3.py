"""Stable Diffusion 3 and 3.5: joint attention over picture and text, two CLIP encoders and T5, flow matching.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (arXiv 2403.03206).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.diffusion.families.base import Denoiser, Encoding, Family, Layout, Signature, Tensors, t5_length
from pipelines.diffusion.families.reading import Reader, Tokenized, states

if TYPE_CHECKING:
    from torch import Tensor

T5_TOKENS = 256
"""T5 tokens that diffusers' pipeline reads by default."""

MOST_T5_TOKENS = 512
"""Most T5 tokens, for long prompts."""


class StableDiffusion3(Family):
    """SD 3.x; its text encoders are not trained here."""

    name = "sd3"
    title = "Stable Diffusion 3 / 3.5"
    short = "SD 3"
    order = 30
    licence = "Stability AI Community License"
    pipeline = "StableDiffusion3Pipeline"
    other_pipelines: ClassVar[Mapping[str, str]] = {
        "image": "StableDiffusion3Img2ImgPipeline",
        "inpaint": "StableDiffusion3InpaintPipeline",
        "controlnet": "StableDiffusion3ControlNetPipeline",
        "inpainting controlnet": "StableDiffusion3ControlNetInpaintingPipeline",
    }
    controlnet = "SD3ControlNetModel"
    components = ("vae", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    denoisers = (Denoiser("transformer"),)
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    batch_arguments = (
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "pooled_projections",
        "block_controlnet_hidden_states",
    )
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {
        ("encoder_hidden_states",): "embeds",
        ("pooled_projections",): "pooled",
    }
    layout = Layout(("image", "text"), patch=2)
    predictions = ("flow",)
    vae_fields = ("shift_factor",)
    signature = Signature(adapter=r"joint_blocks|attn[._]add_q_proj", checkpoint=r"(^|\.)joint_blocks\.", precedence=2)

    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        positive, negatives, pooled, negative_pooled = pipe.encode_prompt(
            prompt=prompt,
            prompt_2=None,
            prompt_3=None,
            device=pipe._execution_device,
            num_images_per_prompt=images,
            do_classifier_free_guidance=guided,
            negative_prompt=negative,
        )
        return self.encoding(
            {"embeds": positive, "pooled": pooled}, {"embeds": negatives, "pooled": negative_pooled}, guided
        )

    def condition(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        import torch

        prompts = list(texts)
        with torch.no_grad():
            embeds, _, pooled, _ = pipe.encode_prompt(
                prompts,
                prompts,
                prompts,
                do_classifier_free_guidance=False,
                max_sequence_length=t5_length(pipe.tokenizer_3, T5_TOKENS),
            )
        return {"embeds": embeds, "pooled": pooled}

    def readers(self, pipe: Any) -> list[Reader]:
        clips = [Reader(name, "clip", pipe.tokenizer_max_length) for name in ("text_encoder", "text_encoder_2")]
        t5 = Reader("text_encoder_3", "t5", T5_TOKENS, MOST_T5_TOKENS // T5_TOKENS)
        return clips if pipe.text_encoder_3 is None else [*clips, t5]

    def encode_tokenized(self, pipe: Any, tokens: Mapping[str, Tokenized]) -> Tensors:
        import torch

        clips = {name: states(pipe, name, tokens[name], -2) for name in ("text_encoder", "text_encoder_2")}
        embeds = torch.cat([found for found, _ in clips.values()], -1)
        embeds = torch.nn.functional.pad(embeds, (0, pipe.transformer.config.joint_attention_dim - embeds.shape[-1]))
        if "text_encoder_3" in tokens:
            last = states(pipe, "text_encoder_3", tokens["text_encoder_3"])[0]
        else:  # without T5 the pipeline uses zeros
            last = embeds.new_zeros(1, T5_TOKENS, embeds.shape[-1])
        pooled = torch.cat([pooled for _, pooled in clips.values() if pooled is not None], -1)
        return {"embeds": torch.cat([embeds, last.to(embeds)], 1), "pooled": pooled}

    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        predicted: Tensor = denoiser(
            hidden_states=noisy,
            timestep=times.to(noisy.dtype) * 1000,
            encoder_hidden_states=given["embeds"].to(noisy.dtype),
            pooled_projections=given["pooled"].to(noisy.dtype),
            return_dict=False,
        )[0]
        return predicted

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        values = {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 16,
        }
        pipe = miniature.make(
            "StableDiffusion3Pipeline",
            transformer=miniature.make("SD3Transformer2DModel", **(values | changes)),
            scheduler=miniature.make("FlowMatchEulerDiscreteScheduler", shift=3.0),
            vae=miniature.vae(shift_factor=0.1),
            text_encoder=miniature.make("CLIPTextModelWithProjection", miniature.clip_config()),
            tokenizer=miniature.clip_tokenizer(),
            text_encoder_2=miniature.make("CLIPTextModelWithProjection", miniature.clip_config()),
            tokenizer_2=miniature.clip_tokenizer(),
            text_encoder_3=miniature.t5(),
            tokenizer_3=miniature.t5_tokenizer(),
        )
        return miniature.quiet(pipe)


FAMILY = StableDiffusion3()
