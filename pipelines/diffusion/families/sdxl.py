"""Stable Diffusion XL: two CLIP encoders (penultimate layers, concatenated), pooled text, and sizes as an input.

Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (arXiv 2307.01952).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.diffusion.families.base import Encoding, Signature, Tensors
from pipelines.diffusion.families.reading import Tokenized, states
from pipelines.diffusion.families.sd import StableDiffusion

if TYPE_CHECKING:
    from torch import Tensor


class StableDiffusionXL(StableDiffusion):
    """SDXL and its derivatives; a UNet called like SD's, with two more inputs."""

    name = "sdxl"
    title = "Stable Diffusion XL"
    short = "SDXL"
    order = 20
    licence = "Open RAIL++-M; derivatives have their own"
    checked = "tiny random models"
    pipeline = "StableDiffusionXLPipeline"
    other_pipelines: ClassVar[Mapping[str, str]] = {
        "image": "StableDiffusionXLImg2ImgPipeline",
        "inpaint": "StableDiffusionXLInpaintPipeline",
        "controlnet": "StableDiffusionXLControlNetPipeline",
        "controlnet image": "StableDiffusionXLControlNetImg2ImgPipeline",
        "controlnet inpaint": "StableDiffusionXLControlNetInpaintPipeline",
        "t2i-adapter": "StableDiffusionXLAdapterPipeline",
    }
    components = ("vae", "unet", "text_encoder", "text_encoder_2")
    text_encoders = ("text_encoder", "text_encoder_2")
    learning_encoders = ("text_encoder", "text_encoder_2")
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {
        ("encoder_hidden_states",): "embeds",
        ("added_cond_kwargs", "text_embeds"): "pooled",
    }
    vae_fields = ("latents_mean", "latents_std")
    denoiser_inputs: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **StableDiffusion.denoiser_inputs,
        "addition_embed_type": ("text_time",),
    }
    size_input = True
    zeros_field = "force_zeros_for_empty_prompt"
    usual_size = 1024
    signature = Signature(
        adapter=r"text_encoder_2|lora_te2|lora_te1|text_encoders\.clip_g",
        checkpoint=r"conditioner\.embedders\.(1|0\.model)\.|add_embedding\.linear_1|label_emb\.0\.0",
        width=2048,
        hints=r"sdxl|stable-diffusion-xl",
    )

    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        positive, negatives, pooled, negative_pooled = pipe.encode_prompt(
            prompt=prompt,
            device=pipe._execution_device,
            num_images_per_prompt=images,
            do_classifier_free_guidance=guided,
            negative_prompt=negative,
        )
        return self.encoding(
            {"embeds": positive, "pooled": pooled}, {"embeds": negatives, "pooled": negative_pooled}, guided
        )

    def encode_tokenized(self, pipe: Any, tokens: Mapping[str, Tokenized]) -> Tensors:
        import torch

        made = {name: states(pipe, name, its, -2) for name, its in tokens.items()}
        pooled = made["text_encoder_2"][1]
        assert pooled is not None
        return {"embeds": torch.cat([found for found, _ in made.values()], -1), "pooled": pooled}

    def encode_tokens(self, pipe: Any, tokens: Mapping[str, Tensor], encoders: Mapping[str, Any]) -> Tensors:
        import torch

        outputs = {n: encoders[n](tokens[n], output_hidden_states=True) for n in self.learning_encoders}
        embeds = torch.cat([outputs[name].hidden_states[-2] for name in self.learning_encoders], dim=-1)
        return {"embeds": embeds, "pooled": outputs["text_encoder_2"][0]}

    def null_condition(self, pipe: Any, text: str = "") -> Tensors:
        given = self.condition(pipe, [text])
        if not text and pipe.config.force_zeros_for_empty_prompt:
            return {name: value.new_zeros(value.shape) for name, value in given.items()}
        return given

    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        added = {"text_embeds": given["pooled"].to(noisy.dtype), "time_ids": given["time_ids"].to(noisy.dtype)}
        predicted: Tensor = denoiser(
            noisy,
            times,
            encoder_hidden_states=given["embeds"].to(noisy.dtype),
            timestep_cond=given.get("guidance"),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return predicted

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        values = {
            "cross_attention_dim": 16 + 24,
            "transformer_layers_per_block": (1, 2),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        }
        wide = miniature.clip_config(24, projection_dim=16, hidden_act="gelu")
        pipe = miniature.make(
            "StableDiffusionXLPipeline",
            vae=miniature.vae(),
            text_encoder=miniature.make("CLIPTextModel", miniature.clip_config()),
            text_encoder_2=miniature.make("CLIPTextModelWithProjection", wide),
            tokenizer=miniature.clip_tokenizer(),
            tokenizer_2=miniature.clip_tokenizer(),
            unet=miniature.unet(**(values | changes)),
            scheduler=miniature.ddim(),
            add_watermarker=False,
        )
        return miniature.quiet(pipe)


FAMILY = StableDiffusionXL()
