"""Flux.1: double and single stream blocks over T5's tokens and packed latents, pooled CLIP text, guidance as an input.

Black Forest Labs 2024 (no paper; https://github.com/black-forest-labs/flux).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.diffusion.families.base import (
    Denoiser,
    Encoding,
    Family,
    Layout,
    Signature,
    Tensors,
    even_sigmas,
    latent_factor,
    t5_length,
    within,
)
from pipelines.diffusion.families.reading import Reader, Tokenized, states

if TYPE_CHECKING:
    from torch import Tensor

KONTEXT = "FluxKontextPipeline"
"""Flux.1 Kontext (arXiv 2506.15742): the same networks; tokens of the picture to edit follow those of the new one."""

LARGEST = 1024**2
"""Pixels that Kontext draws at most."""

T5_TOKENS = 512
"""T5 tokens that diffusers' pipeline reads."""


class Flux(Family):
    """Flux.1; latents are packed two by two into tokens."""

    name = "flux"
    title = "Flux"
    short = "Flux"
    order = 40
    licence = "FLUX.1 [dev] and Kontext [dev] Non-Commercial License; [schnell] Apache 2.0"
    pipeline = "FluxPipeline"
    other_pipelines: ClassVar[Mapping[str, str]] = {
        "image": "FluxImg2ImgPipeline",
        "inpaint": "FluxInpaintPipeline",
        "controlnet": "FluxControlNetPipeline",
        "controlnet image": "FluxControlNetImg2ImgPipeline",
        "controlnet inpaint": "FluxControlNetInpaintPipeline",
        "edit": KONTEXT,
        "edit inpaint": "FluxKontextInpaintPipeline",
    }
    bases: ClassVar[tuple[str, ...]] = (KONTEXT,)
    controlnet = "FluxControlNetModel"
    components: ClassVar[tuple[str, ...]] = ("vae", "transformer", "text_encoder", "text_encoder_2")
    denoisers = (Denoiser("transformer"),)
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    batch_arguments: ClassVar[tuple[str, ...]] = (
        "hidden_states",
        "timestep",
        "guidance",
        "encoder_hidden_states",
        "pooled_projections",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
    )
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {
        ("encoder_hidden_states",): "embeds",
        ("pooled_projections",): "pooled",
    }
    layout = Layout(("text", "image", "reference"), patch=2, packed=True)
    predictions = ("flow",)
    vae_fields = ("shift_factor",)
    guidance_input = True
    signature = Signature(
        adapter=r"single_transformer_blocks|single_blocks|double_blocks",
        checkpoint=r"(^|\.)double_blocks\.\d+\.img_attn|single_transformer_blocks",
        precedence=3,
    )

    def resolution(self, pipe: Any) -> int:
        return int(pipe.default_sample_size) * latent_factor(pipe)

    def timetable(self, pipe: Any, steps: int, size: tuple[int, int]) -> dict[str, Any]:
        usual = super().timetable(pipe, steps, size)
        if not pipe.scheduler.config.get("use_flow_sigmas"):
            del usual["num_inference_steps"]
            usual["sigmas"] = even_sigmas(steps)
        return usual

    def size_from(self, pipe: Any, image: Any) -> tuple[int, int]:
        size = super().size_from(pipe, image)
        return within(size, LARGEST, self.pixel_step(pipe)) if type(pipe).__name__ == KONTEXT else size

    def size_arguments(self, pipe: Any, height: int | None, width: int | None) -> dict[str, Any]:
        """Kontext's pipeline scales every size to ``max_area``."""
        size = super().size_arguments(pipe, height, width)
        if "Kontext" not in type(pipe).__name__ or height is None or width is None:
            return size
        return size | {"max_area": height * width}

    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        positive, pooled, _ = pipe.encode_prompt(prompt, None, pipe._execution_device, images)
        given = {"embeds": positive, "pooled": pooled}
        if not guided:
            return self.encoding(given, {}, False)
        negatives, negative_pooled, _ = pipe.encode_prompt(negative or "", None, pipe._execution_device, images)
        return self.encoding(given, {"embeds": negatives, "pooled": negative_pooled}, True)

    def condition(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        import torch

        with torch.no_grad():
            embeds, pooled, _ = pipe.encode_prompt(
                list(texts), list(texts), max_sequence_length=t5_length(pipe.tokenizer_2, T5_TOKENS)
            )
        return {"embeds": embeds, "pooled": pooled}

    def readers(self, pipe: Any) -> list[Reader]:
        pooling = Reader("text_encoder", "clip", pipe.tokenizer_max_length, 1, places=False)
        return [pooling, Reader("text_encoder_2", "t5", T5_TOKENS, 1)]

    def encode_tokenized(self, pipe: Any, tokens: Mapping[str, Tokenized]) -> Tensors:
        pooled = states(pipe, "text_encoder", tokens["text_encoder"])[1]
        assert pooled is not None
        return {"embeds": states(pipe, "text_encoder_2", tokens["text_encoder_2"])[0], "pooled": pooled}

    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        import torch

        batch, channels, height, width = noisy.shape
        packed = pipe._pack_latents(noisy, batch, channels, height, width)
        picture_ids = pipe._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype)
        text_ids = torch.zeros(given["embeds"].shape[1], 3, device=noisy.device, dtype=noisy.dtype)
        guided = pipe.transformer.config.guidance_embeds
        predicted = denoiser(
            hidden_states=packed,
            timestep=times.to(noisy.dtype),
            guidance=torch.full((batch,), guidance, device=noisy.device) if guided else None,
            pooled_projections=given["pooled"].to(noisy.dtype),
            encoder_hidden_states=given["embeds"].to(noisy.dtype),
            txt_ids=text_ids,
            img_ids=picture_ids,
            return_dict=False,
        )[0]
        return unpack(predicted, height, width)

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        values = {
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (2, 2, 4),
            "guidance_embeds": True,
        }
        pipe = miniature.make(
            "FluxPipeline",
            transformer=miniature.make("FluxTransformer2DModel", **(values | changes)),
            scheduler=miniature.make("FlowMatchEulerDiscreteScheduler"),
            vae=miniature.vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=miniature.make("CLIPTextModel", miniature.clip_config()),
            tokenizer=miniature.clip_tokenizer(),
            text_encoder_2=miniature.t5(),
            tokenizer_2=miniature.t5_tokenizer(),
        )
        return miniature.quiet(pipe)


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """``(batch, h/2 * w/2, 4 c)`` -> ``(batch, c, h, w)``: inverse of the pipeline's packing."""
    batch, _, depth = packed.shape
    grid = packed.view(batch, height // 2, width // 2, depth // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, depth // 4, height, width)


FAMILY = Flux()
