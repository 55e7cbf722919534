"""Sana: linear attention over image tokens, cross-attention to the states of a language model (Gemma 2), flow matching.

Xie et al. 2024, "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers"
(arXiv 2410.10629). Its autoencoder shrinks pictures 32 times and has no deviation. Before a prompt stands an
instruction to improve it, as in diffusers' pipeline; its sampler is DPM-Solver++ for flows.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from math import lcm
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.diffusion.families.base import (
    Denoiser,
    Encoding,
    Family,
    Layout,
    Signature,
    Tensors,
    layer_choices,
    spans_in,
)
from pipelines.diffusion.families.renaming import Rule, renamed

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats.lora import LoraFile

TOKENS = 300
"""Tokens of a prompt that diffusers' pipeline reads, the instruction not counted."""

ATTENTION = r".*\.attn[12]\.to_(q|k|v|out\.0)"
FEED_FORWARD = r".*\.ff\.conv_(inverted|point)"
OUTSIDE = r"(patch_embed.*|time_embed.*|caption_projection.*|proj_out|.*\.conv_depth)"
"""First and last layers, and convolutions per channel, which take no adapter here."""


NAMES: tuple[Rule, ...] = (
    (r"blocks_(\d+)_attn_qkv", tuple(rf"transformer_blocks_\1_attn1_to_{one}" for one in "qkv")),
    (r"blocks_(\d+)_attn_proj", (r"transformer_blocks_\1_attn1_to_out_0",)),
    (r"blocks_(\d+)_cross_attn_q_linear", (r"transformer_blocks_\1_attn2_to_q",)),
    (r"blocks_(\d+)_cross_attn_kv_linear", tuple(rf"transformer_blocks_\1_attn2_to_{one}" for one in "kv")),
    (r"blocks_(\d+)_cross_attn_proj", (r"transformer_blocks_\1_attn2_to_out_0",)),
    (r"blocks_(\d+)_mlp_(inverted|depth|point)_conv_conv", (r"transformer_blocks_\1_ff_conv_\2",)),
    (r"x_embedder_proj", ("patch_embed_proj",)),
    (r"t_embedder_mlp_0", ("time_embed_emb_timestep_embedder_linear_1",)),
    (r"t_embedder_mlp_2", ("time_embed_emb_timestep_embedder_linear_2",)),
    (r"t_block_1", ("time_embed_linear",)),
    (r"y_embedder_y_proj_fc([12])", (r"caption_projection_linear_\1",)),
    (r"final_layer_linear", ("proj_out",)),
)
"""The authors' names."""


class Sana(Family):
    """Sana and Sana 1.5; Sana Sprint, which takes the guidance as an input, has another pipeline."""

    name = "sana"
    title = "Sana"
    short = "Sana"
    order = 80
    licence = "NVIDIA License (NSCL v2-custom) and Gemma Terms of Use"
    single_file = False
    pipeline = "SanaPipeline"
    components = ("vae", "transformer", "text_encoder")
    denoisers = (Denoiser("transformer"),)
    text_encoders = ()
    batch_arguments = ("encoder_hidden_states", "encoder_attention_mask", "timestep")
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {
        ("encoder_hidden_states",): "embeds",
        ("encoder_attention_mask",): "mask",
    }
    call_names: ClassVar[Mapping[str, str]] = {"embeds": "prompt_embeds", "mask": "prompt_attention_mask"}
    always: ClassVar[Mapping[str, Any]] = MappingProxyType({"use_resolution_binning": False, "negative_prompt": None})
    targets = layer_choices(ATTENTION, FEED_FORWARD, OUTSIDE)
    layout = Layout(text_layers=r"attn2\.to_[kv]$|^caption_projection\.", across=r"attn2$", linear=True)
    text_tensors = ("embeds", "mask")
    vae_fields = (
        "attention_head_dim",
        "encoder_block_types",
        "decoder_block_types",
        "encoder_block_out_channels",
        "decoder_block_out_channels",
        "encoder_layers_per_block",
        "decoder_layers_per_block",
        "encoder_qkv_multiscales",
        "decoder_qkv_multiscales",
        "upsample_block_type",
        "downsample_block_type",
        "decoder_norm_types",
        "decoder_act_fns",
        "encoder_out_shortcut",
        "decoder_in_shortcut",
        "decoder_conv_act_fn",
    )
    predictions = ("flow",)
    denoiser_inputs: ClassVar[Mapping[str, tuple[Any, ...]]] = {"guidance_embeds": (None, False)}
    prompt_tokens = TOKENS
    signature = Signature(
        adapter=r"ff[._]conv_(inverted|point|depth)|cross_attn[._](q|kv)_linear|"
        r"blocks[._]\d+[._]mlp[._](inverted|depth|point)_conv",
        checkpoint=r"blocks\.\d+\.cross_attn\.(q|kv)_linear|ff\.conv_inverted\.",
        width=2240,
        hints=r"sana",
        precedence=4,
    )

    def named(self, file: LoraFile, pipe: Any) -> LoraFile:
        return renamed(file, self.denoiser, NAMES)

    # ------------------------------------------------------------------ sizes and latents
    def pixel_step(self, pipe: Any) -> int:
        """At least 32, as diffusers' pipeline demands for every model."""
        return lcm(32, super().pixel_step(pipe))

    def latent_factor(self, pipe: Any) -> int:
        return 1 << (len(pipe.vae.config.encoder_block_out_channels) - 1)

    def picture_arguments(self) -> dict[str, Any]:
        """The pipeline keeps the size that it is asked for."""
        return {"use_resolution_binning": False}

    def moments(self, pipe: Any, pixels: Tensor) -> Tensor:
        import torch

        latent = pipe.vae.encode(pixels).latent
        return torch.stack([latent, torch.zeros_like(latent)], 1)

    # ------------------------------------------------------------------ prompts
    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        embeds, mask, others, other_mask = pipe.encode_prompt(
            prompt, guided, negative or "", images, complex_human_instruction=_instruction(pipe)
        )
        return self.encoding({"embeds": embeds, "mask": mask}, {"embeds": others, "mask": other_mask}, guided)

    def condition(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        import torch

        with torch.no_grad():
            embeds, mask, _, _ = pipe.encode_prompt(
                list(texts), do_classifier_free_guidance=False, complex_human_instruction=_instruction(pipe)
            )
        return {"embeds": embeds, "mask": mask}

    def null_condition(self, pipe: Any, text: str = "") -> Tensors:
        """As the pipeline encodes negative prompts: without the instruction."""
        import torch

        with torch.no_grad():
            embeds, mask, _, _ = pipe.encode_prompt([text], do_classifier_free_guidance=False)
        return {"embeds": embeds, "mask": mask}

    def text_spans(self, pipe: Any, text: str) -> list[tuple[int, int]]:
        """Of the instruction and the prompt in small letters the pipeline keeps the first and the last tokens."""
        instruction, small = "\n".join(_instruction(pipe)), text.lower().strip()
        before = len(text) - len(text.lstrip())
        length = len(pipe.tokenizer.encode(instruction)) + TOKENS - 2
        spans = spans_in(pipe.tokenizer, instruction + small, small, length)
        padded = [*spans, *[(0, 0)] * (length - len(spans))]
        moved = [(first + before, last + before) if last else (0, 0) for first, last in padded]
        return [moved[0], *moved[1 - TOKENS :]]

    # ------------------------------------------------------------------ denoiser
    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        predicted: Tensor = denoiser(
            noisy,
            encoder_hidden_states=given["embeds"].to(noisy.dtype),
            encoder_attention_mask=given["mask"],
            timestep=times * 1000 * pipe.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return predicted[:, : noisy.shape[1]]  # some bases also predict a deviation

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        values = {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 32,
            "sample_size": 16,
        }
        tokenizer = miniature.marked_tokenizer("<bos>", longest=4096)
        vae = miniature.make(
            "AutoencoderDC",
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 16),
            decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            upsample_block_type="interpolate",
            downsample_block_type="stride_conv",
            scaling_factor=0.41407,
        )
        pipe = miniature.make(
            "SanaPipeline",
            tokenizer=tokenizer,
            text_encoder=miniature.language_model("Gemma2", tokenizer, query_pre_attn_scalar=16),
            vae=vae,
            transformer=miniature.make("SanaTransformer2DModel", **(values | changes)),
            scheduler=miniature.make(
                "DPMSolverMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
        return miniature.quiet(pipe)


def _instruction(pipe: Any) -> Any:
    """What the pipeline writes before every prompt."""
    return inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default


FAMILY = Sana()
