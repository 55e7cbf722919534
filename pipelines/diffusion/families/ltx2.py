"""LTX-2: videos with sound; one transformer over both, Gemma 3's states through connectors, flow matching.

HaCohen et al. 2026, "LTX-2: Efficient Joint Audio-Visual Foundation Model" (arXiv 2601.03233).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from adapters.errors import InputError
from pipelines.diffusion.families.base import (
    Denoiser,
    Encoding,
    Family,
    Layout,
    Signature,
    Tensors,
    Video,
    even_sigmas,
)

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats.lora import LoraFile
    from pipelines.videos import Sound

TOKENS = 1024
"""Text tokens that diffusers' pipeline reads."""

_ATTENTION = r"(.*\.)?((audio_)?attn[12]|audio_to_video_attn|video_to_audio_attn)\.(to_[qkv]|to_out\.0)"
_ALL = r"(?!((audio_)?proj_(in|out))$).*"

RENAMED = (
    ("patchify_proj", "proj_in"),
    ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
    ("prompt_adaln_single", "prompt_adaln"),
    ("adaln_single", "time_embed"),
)
"""Parts of the authors' module names -> diffusers' (in this order); all other names are the same."""


class LTX2(Family):
    """LTX-2; the same hidden states and gates serve picture and sound."""

    name = "ltx2"
    title = "LTX-2 (video with sound)"
    short = "LTX-2"
    order = 90
    licence = "LTX-2 Community License"
    pipeline = "LTX2Pipeline"
    other_pipelines: ClassVar[Mapping[str, str]] = {"image": "LTX2ImageToVideoPipeline"}
    components = ("vae", "transformer", "text_encoder", "connectors", "audio_vae", "vocoder")
    denoisers = (Denoiser("transformer"),)
    video = Video(frames=121, rate=24, step=8, size=(512, 768), argument="frame_rate", regions=False)
    outputs = 2
    untrainable = "LoRAs of LTX-2 are not trained here: train with another program and compose them here."
    text_encoders = ()
    batch_arguments = (
        "hidden_states",
        "audio_hidden_states",
        "encoder_hidden_states",
        "audio_encoder_hidden_states",
        "timestep",
        "audio_timestep",
        "sigma",
        "audio_sigma",
        "encoder_attention_mask",
        "audio_encoder_attention_mask",
        "video_coords",
        "audio_coords",
    )
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {}
    call_names: ClassVar[Mapping[str, str]] = {"embeds": "prompt_embeds", "mask": "prompt_attention_mask"}
    targets: ClassVar[Mapping[str, str]] = {
        "attention": _ATTENTION,
        "attention-mlp": rf"{_ATTENTION}|(.*\.)?(audio_)?ff\.net\.(0\.proj|2)",
        "linear": _ALL,
        "all": _ALL,
    }
    layout = Layout(("image",), packed=True)
    predictions = ("flow",)
    inner_regions = False
    usual_guidance = 3.0
    prompt_tokens = TOKENS
    usual_size = 512
    signature = Signature(
        adapter=r"transformer_blocks[._]\d+[._](audio_(attn|ff)|(audio_to_video|video_to_audio)_attn)|audio_patchify_proj",
        checkpoint=r"(^|\.)audio_patchify_proj\.",
        hints=r"^ltx-?2",
        precedence=6,
    )

    # ------------------------------------------------------------------ sizes
    def pixel_step(self, pipe: Any) -> int:
        return self.latent_factor(pipe)

    def latent_factor(self, pipe: Any) -> int:
        factor: int = pipe.vae_spatial_compression_ratio
        return factor

    def grid(self, pipe: Any, height: int, width: int) -> tuple[int, int]:
        factor = self.latent_factor(pipe)
        return height // factor, width // factor

    def size(self, pipe: Any) -> tuple[int, int]:
        return self.video.size

    def resolution(self, pipe: Any) -> int:
        return self.usual_size

    def timetable(self, pipe: Any, steps: int, size: tuple[int, int]) -> dict[str, Any]:
        usual = super().timetable(pipe, steps, size)
        return {"sigmas": even_sigmas(steps), **{key: value for key, value in usual.items() if key == "mu"}}

    # ------------------------------------------------------------------ latents
    def unpacked(self, pipe: Any, tokens: Tensor, height: int, width: int) -> Tensor:
        """The first frame of the pipeline's tokens."""
        rows, columns = self.grid(pipe, height, width)
        frames = pipe._unpack_latents(tokens, tokens.shape[1] // (rows * columns), rows, columns)
        first: Tensor = frames[:, :, 0]
        return first

    def decoded(self, pipe: Any, latents: Tensor) -> Tensor:
        vae = pipe.vae
        frames = pipe._denormalize_latents(
            latents[:, :, None], vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )
        time = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        pixels: Tensor = vae.decode(frames.to(vae.dtype), time, return_dict=False)[0]
        return pixels[:, :, 0]

    def sound(self, pipe: Any, result: Any) -> tuple[Sound, ...]:
        from pipelines.videos import Sound

        if result.audio is None or result.audio.ndim != 3:  # latents were asked for
            return ()
        rate = int(pipe.vocoder.config.output_sampling_rate)
        return tuple(Sound(samples.float().cpu(), rate) for samples in result.audio)

    # ------------------------------------------------------------------ files
    def named(self, file: LoraFile, pipe: Any) -> LoraFile:
        """The authors' names, which ComfyUI and the authors' trainer write, as diffusers' names."""
        parts = {part: dict(layers) for part, layers in file.parts.items()}
        for part in ("unet", "model"):
            if part in parts and any("transformer_blocks" in name for name in parts[part]):
                if "transformer" in parts:
                    raise InputError("The adapter names the layers of its denoiser in two ways: save it again.")
                parts["transformer"] = parts.pop(part)
        if "connectors" in parts:
            raise InputError(
                "The adapter also changes LTX-2's text connectors, which read the prompt before the first step: only "
                "adapters of the transformer can be composed."
            )
        layers = parts.get("transformer", {})
        if layers:
            parts["transformer"] = {diffusers_name(name): layer for name, layer in layers.items()}
        return file.with_parts(parts, file.flat)

    # ------------------------------------------------------------------ prompts
    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        embeds, mask, other, other_mask = pipe.encode_prompt(
            prompt=prompt,
            negative_prompt=negative,
            do_classifier_free_guidance=guided,
            num_videos_per_prompt=images,
            max_sequence_length=TOKENS,
            device=pipe._execution_device,
        )
        return self.encoding({"embeds": embeds, "mask": mask}, {"embeds": other, "mask": other_mask}, guided)

    def condition(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        import torch

        with torch.no_grad():
            embeds, mask, _, _ = pipe.encode_prompt(list(texts), do_classifier_free_guidance=False)
        return {"embeds": embeds, "mask": mask}

    # ------------------------------------------------------------------ tests
    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch
        from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
        from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        rope: dict[str, Any] = {"rope_double_precision": False, "rope_type": "split"}
        heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
        values: dict[str, Any] = {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 2,
            "caption_channels": 16,
        }
        config = miniature.make(
            "Gemma3Config",
            text_config={
                "vocab_size": len(miniature.t5_tokenizer()), "hidden_size": 16, "intermediate_size": 32, "head_dim": 8,
                "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                "max_position_embeddings": TOKENS,
            },
            vision_config={
                "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 8,
            },
            mm_tokens_per_image=4,
        )  # fmt: skip
        pipe = miniature.make(
            "LTX2Pipeline",
            scheduler=miniature.make("FlowMatchEulerDiscreteScheduler"),
            vae=miniature.make(
                "AutoencoderKLLTX2Video", latent_channels=4, block_out_channels=(8, 16, 32, 32),
                decoder_block_out_channels=(8, 16, 32), layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4,
                spatial_compression_ratio=32, temporal_compression_ratio=8,
            ),
            audio_vae=miniature.make(
                "AutoencoderKLLTX2Audio", base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32,
                latent_channels=2, mel_bins=8,
            ),
            text_encoder=miniature.make("Gemma3ForConditionalGeneration", config),
            tokenizer=miniature.t5_tokenizer(),
            connectors=LTX2TextConnectors(
                caption_channels=16, text_proj_in_factor=3, connector_rope_base_seq_len=32, **rope,
                **{f"{side}_connector_{name}": value for side in ("video", "audio") for name, value in heads.items()},
            ).eval(),
            transformer=miniature.make("LTX2VideoTransformer3DModel", **(values | rope | changes)),
            vocoder=LTX2Vocoder(
                in_channels=16, hidden_channels=16, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
                resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
            ).eval(),
        )  # fmt: skip
        return miniature.quiet(pipe)


def diffusers_name(module: str) -> str:
    """diffusers' name of a module that the authors call ``module``, with its dots or with underscores."""
    for old, new in RENAMED:
        module = module.replace(old, new)
    return module


FAMILY = LTX2()
