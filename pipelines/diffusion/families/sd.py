"""Stable Diffusion 1.x and 2.x: a UNet with cross-attention to one CLIP encoder.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.diffusion.families.base import (
    Denoiser,
    Encoding,
    Family,
    Signature,
    Tensors,
    latent_factor,
    tokenizer_of,
)
from pipelines.diffusion.families.reading import Reader, Tokenized, states

if TYPE_CHECKING:
    from torch import Tensor

UNET_ARGUMENTS = (
    "sample",
    "timestep",
    "encoder_hidden_states",
    "timestep_cond",
    "added_cond_kwargs",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


class StableDiffusion(Family):
    """SD 1.x and 2.x."""

    name = "sd"
    title = "Stable Diffusion 1.x / 2.x"
    short = "SD 1.5/2"
    order = 10
    licence = "CreativeML Open RAIL-M (1.x) and Open RAIL++-M (2.x)"
    checked = "the embedded base, tiny random models"
    pipeline = "StableDiffusionPipeline"
    other_pipelines: ClassVar[Mapping[str, str]] = {
        "image": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
        "controlnet": "StableDiffusionControlNetPipeline",
        "controlnet image": "StableDiffusionControlNetImg2ImgPipeline",
        "controlnet inpaint": "StableDiffusionControlNetInpaintPipeline",
        "t2i-adapter": "StableDiffusionAdapterPipeline",
    }
    controlnet = "ControlNetModel"
    components: ClassVar[tuple[str, ...]] = ("vae", "unet", "text_encoder")
    denoisers = (Denoiser("unet"),)
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    learning_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    batch_arguments = UNET_ARGUMENTS
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {("encoder_hidden_states",): "embeds"}
    predictions = ("epsilon", "v_prediction", "sample")
    denoiser_inputs: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": (None,),
        "encoder_hid_dim_type": (None, "text_proj", "ip_image_proj"),
    }
    usual_size = 512
    signature = Signature(
        adapter=r"down_blocks|up_blocks|mid_block|input_blocks|lora_unet|text_model|clip_l",
        checkpoint=r"model\.diffusion_model\.(input_blocks|middle_block|output_blocks)|^cond_stage_model\.",
        precedence=0,
    )

    def multiple(self, pipe: Any) -> int:
        """The VAE's factor times the UNet's."""
        levels: int = len(pipe.unet.config.block_out_channels)
        return latent_factor(pipe) << (levels - 1)

    def opened(self, pipe: Any, names: Collection[str], source: str) -> list[str]:
        """Derivatives that predict v say so by empty tensors "v_pred" and "ztsnr" (zero terminal SNR), or by name."""
        name = Path(source).stem.lower()
        if "v_pred" not in names and not re.search(r"(?<![a-z])v[-_ ]?pred", name):
            return []
        changes: dict[str, Any] = {"prediction_type": "v_prediction"}
        done = "predicts v"
        if "ztsnr" in names or re.search(r"(?<![a-z])zt?snr", name):
            changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            done += " with zero terminal SNR"
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
        return [done]

    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        positive, negatives = pipe.encode_prompt(prompt, pipe._execution_device, images, guided, negative)
        return self.encoding({"embeds": positive}, {"embeds": negatives}, guided)

    def readers(self, pipe: Any) -> list[Reader]:
        return [
            Reader(name, "clip", tokenizer_of(pipe, name).model_max_length)
            for name in self.text_encoders
            if getattr(pipe, name, None) is not None
        ]

    def encode_tokenized(self, pipe: Any, tokens: Mapping[str, Tokenized]) -> Tensors:
        return {"embeds": states(pipe, "text_encoder", tokens["text_encoder"])[0]}

    def encode_tokens(self, pipe: Any, tokens: Mapping[str, Tensor], encoders: Mapping[str, Any]) -> Tensors:
        return {"embeds": encoders["text_encoder"](tokens["text_encoder"])[0]}

    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        predicted: Tensor = denoiser(
            noisy,
            times,
            encoder_hidden_states=given["embeds"].to(noisy.dtype),
            timestep_cond=given.get("guidance"),
            return_dict=False,
        )[0]
        return predicted

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        pipe = miniature.make(
            "StableDiffusionPipeline",
            vae=miniature.vae(),
            text_encoder=miniature.make("CLIPTextModel", miniature.clip_config()),
            tokenizer=miniature.clip_tokenizer(),
            unet=miniature.unet(**changes),
            scheduler=miniature.ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return miniature.quiet(pipe)


FAMILY = StableDiffusion()
