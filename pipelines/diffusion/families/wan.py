"""Wan 2.1 and 2.2: videos; self-attention over all frames, cross-attention to UMT5's tokens, flow matching.

Wan Team 2025, "Wan: Open and Advanced Large-Scale Video Generative Models" (arXiv 2503.20314). The bases differ:

    Wan 2.1            one transformer; the one for a start picture also reads CLIP's view of it (36 input channels)
    Wan 2.2 A14B       ``transformer`` for noise levels from ``boundary_ratio`` up, ``transformer_2`` below
    Wan 2.2 5B         one transformer, a noise level per token (``expand_timesteps``), a VAE with factor 16
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from adapters.errors import InputError
from pipelines.diffusion.families.base import (
    Denoiser,
    Encoding,
    Family,
    Joined,
    Layout,
    Signature,
    Tensors,
    Video,
)

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats.lora import LoraFile

TOKENS = 512
"""Text tokens that diffusers' pipeline reads."""

_ATTENTION = r"(.*\.)?attn[12]\.(to_[qkv]|to_out\.0|add_[kv]_proj)"
_ALL = r"(?!(patch_embedding|proj_out)$).*"

ORIGINAL: Mapping[str, str] = {
    r"blocks_(\d+)_self_attn_(q|k|v)": r"blocks.\1.attn1.to_\2",
    r"blocks_(\d+)_self_attn_o": r"blocks.\1.attn1.to_out.0",
    r"blocks_(\d+)_cross_attn_(q|k|v)": r"blocks.\1.attn2.to_\2",
    r"blocks_(\d+)_cross_attn_o": r"blocks.\1.attn2.to_out.0",
    r"blocks_(\d+)_cross_attn_(k|v)_img": r"blocks.\1.attn2.add_\2_proj",
    r"blocks_(\d+)_ffn_0": r"blocks.\1.ffn.net.0.proj",
    r"blocks_(\d+)_ffn_2": r"blocks.\1.ffn.net.2",
    r"time_embedding_0": "condition_embedder.time_embedder.linear_1",
    r"time_embedding_2": "condition_embedder.time_embedder.linear_2",
    r"time_projection_1": "condition_embedder.time_proj",
    r"text_embedding_0": "condition_embedder.text_embedder.linear_1",
    r"text_embedding_2": "condition_embedder.text_embedder.linear_2",
    r"img_emb_proj_1": "condition_embedder.image_embedder.ff.net.0.proj",
    r"img_emb_proj_3": "condition_embedder.image_embedder.ff.net.2",
    r"head_head": "proj_out",
}
"""Names of the authors' modules, dots as underscores -> diffusers' names (of which none joins or splits layers)."""


class Wan(Family):
    """Wan 2.x; its text encoder is not trained here."""

    name = "wan"
    title = "Wan 2.1 / 2.2 (video)"
    short = "Wan"
    order = 80
    licence = "Apache 2.0"
    pipeline = "WanPipeline"
    bases = ("WanImageToVideoPipeline",)
    single_file = False
    other_pipelines: ClassVar[Mapping[str, str]] = {"image": "WanImageToVideoPipeline"}
    components = ("vae", "transformer", "text_encoder")
    denoisers = (Denoiser("transformer", word="high"), Denoiser("transformer_2", word="low"))
    video = Video(frames=81, rate=16, step=4, size=(480, 832))
    text_encoders = ()
    batch_arguments = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {("encoder_hidden_states",): "embeds"}
    targets: ClassVar[Mapping[str, str]] = {
        "attention": _ATTENTION,
        "attention-mlp": rf"{_ATTENTION}|(.*\.)?ffn\.net\.(0\.proj|2)",
        "linear": _ALL,
        "all": _ALL,
    }
    layout = Layout(("image",), patch=2, text_layers=r"attn2\.to_[kv]$|text_embedder\.", across=r"attn2$")
    predictions = ("flow",)
    prompt_tokens = TOKENS
    vae_fields = (
        "latents_mean", "latents_std", "base_dim", "decoder_base_dim", "z_dim", "dim_mult", "num_res_blocks",
        "attn_scales", "temperal_downsample", "is_residual", "patch_size", "scale_factor_temporal",
        "scale_factor_spatial",
    )  # fmt: skip
    usual_size = 480
    signature = Signature(
        adapter=r"(^|[^a-z_]|lora_(unet|transformer)_|lycoris_)blocks[._]\d+[._]"
        r"((self|cross)_attn[._][qkvo](_img)?\.|attn[12][._](processor[._])?(to_[qkv]|to_out|add_[kv]_proj)|ffn[._]net)",
        checkpoint=r"(^|\.)blocks\.\d+\.cross_attn\.norm_q\.weight$",
        hints=r"^wan",
        precedence=4,
    )

    # ------------------------------------------------------------------ sizes
    def pixel_step(self, pipe: Any) -> int:
        # diffusers' pipeline asks for multiples of 16 whatever the VAE
        return math.lcm(16, self.token_step(pipe))

    def token_step(self, pipe: Any) -> int:
        step: int = pipe.vae_scale_factor_spatial * self.layout.patch
        return step

    def grid(self, pipe: Any, height: int, width: int) -> tuple[int, int]:
        return height // pipe.vae_scale_factor_spatial, width // pipe.vae_scale_factor_spatial

    def size(self, pipe: Any) -> tuple[int, int]:
        return self.video.size

    def input_channels(self, pipe: Any) -> int:
        channels: int = pipe.vae.config.z_dim
        return channels

    def resolution(self, pipe: Any) -> int:
        return self.usual_size

    def latent_factor(self, pipe: Any) -> int:
        factor: int = pipe.vae_scale_factor_spatial
        return factor

    # ------------------------------------------------------------------ files
    def named(self, file: LoraFile, pipe: Any) -> LoraFile:
        """The authors' names, which ComfyUI, musubi-tuner and others write, as diffusers' names."""
        parts = dict(file.parts)
        for part in ("unet", "model"):
            if part in parts and self.signature.fits_adapter("\n".join(f"{name}." for name in parts[part])):
                if "transformer" in parts:
                    raise InputError("The adapter names the layers of its denoiser in two ways: save it again.")
                parts["transformer"] = parts.pop(part)
        written = {part: {name: diffusers_name(name) for name in layers} for part, layers in parts.items()}
        dotted = all("." in name or name == "proj_out" for names in written.values() for name in names.values())
        for part, names in written.items():
            flat = {old: name if dotted else name.replace(".", "_") for old, name in names.items()}
            if len(set(flat.values())) != len(flat):
                raise InputError("The adapter has two layers for one module: save it again with one program.")
            parts[part] = {flat[old]: layer for old, layer in parts[part].items()}
        return file.with_parts(parts, flat=file.flat and not dotted)

    # ------------------------------------------------------------------ prompts
    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        positive = {"embeds": embedded(pipe, [prompt], images)}
        return self.encoding(positive, {"embeds": embedded(pipe, [negative or ""], images)} if guided else {}, guided)

    def condition(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        import torch

        with torch.no_grad():
            return {"embeds": embedded(pipe, texts)}

    @contextmanager
    def alone(self, pipe: Any, joined: Joined, images: int, run: Any) -> Iterator[None]:
        """Texts have no positions.

        Raises:
            InputError: the transformer takes all but the last 512 tokens of its text for those of a start picture.
        """
        if pipe.transformer is not None and pipe.transformer.config.get("image_dim"):
            raise InputError(
                "Regions inside Wan 2.1 for start pictures are not possible, because it reads the picture as the "
                "beginning of one text: use method 'output'."
            )
        yield

    # ------------------------------------------------------------------ denoiser
    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        still = noisy.ndim == 4  # a picture is a video of one frame
        frames = noisy[:, :, None] if still else noisy
        levels = times.to(noisy.dtype) * 1000
        if pipe.config.expand_timesteps:  # one noise level per token
            cells = frames.shape[2] * (frames.shape[3] // self.layout.patch) * (frames.shape[4] // self.layout.patch)
            levels = levels[:, None].expand(-1, cells)
        predicted: Tensor = denoiser(
            hidden_states=frames,
            timestep=levels,
            encoder_hidden_states=given["embeds"].to(noisy.dtype),
            return_dict=False,
        )[0]
        return predicted[:, :, 0] if still else predicted

    # ------------------------------------------------------------------ tests
    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        """A miniature of Wan 2.1; with ``boundary_ratio`` of Wan 2.2 A14B, with ``expand_timesteps`` of the 5B."""
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        options = {name: changes.pop(name) for name in ("boundary_ratio", "expand_timesteps") if name in changes}
        small = bool(options.get("expand_timesteps"))
        values: dict[str, Any] = {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        }
        wide = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
        vae = miniature.make(
            "AutoencoderKLWan",
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.1, 0.2, 0.0],
            latents_std=[1.5, 1.2, 1.0, 0.9],
            **(wide if small else {}),
        )
        config = miniature.make(
            "UMT5Config", vocab_size=len(miniature.t5_tokenizer()), d_model=32, d_kv=8, d_ff=32, num_layers=2,
            num_heads=2,
        )  # fmt: skip
        transformer = miniature.make("WanTransformer3DModel", **(values | changes))
        two = options.get("boundary_ratio") is not None
        pipe = miniature.make(
            "WanPipeline",
            tokenizer=miniature.t5_tokenizer(),
            text_encoder=miniature.make("UMT5EncoderModel", config),
            vae=vae,
            transformer=transformer,
            transformer_2=miniature.make("WanTransformer3DModel", **(values | changes)) if two else None,
            scheduler=miniature.make(
                "UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            **options,
        )
        return miniature.quiet(pipe)


def embedded(pipe: Any, texts: Sequence[str], images: int = 1) -> Tensor:
    """The texts as UMT5's states (texts * images, tokens, width), zero after the end of each.

    Always by the text-to-video pipeline's method, because the same method of the one for start pictures does not work
    without the package ftfy.
    """
    from diffusers import WanPipeline

    method: Any = WanPipeline._get_t5_prompt_embeds
    found: Tensor = method(pipe, list(texts), images, TOKENS, pipe._execution_device)
    return found


def diffusers_name(module: str) -> str:
    """diffusers' name of a module that the authors call ``module``; any other name as it is."""
    flat = module.replace(".", "_")
    for pattern, name in ORIGINAL.items():
        found = re.fullmatch(pattern, flat)
        if found:
            return found.expand(name)
    return module


FAMILY = Wan()
