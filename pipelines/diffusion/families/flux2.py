"""Flux.2 [dev]: double and single stream blocks over the layers of a language model and packed, normalised latents.

Black Forest Labs 2025 (no paper; https://github.com/black-forest-labs/flux2). The text is read by Mistral Small 3, of
which three hidden layers are concatenated. Reference pictures are further tokens behind the picture's, so the ordinary
pipeline also edits (argument ``image``). The autoencoder's output is normalised per channel of a 2 x 2 patch:

    latents = (patched(z) - m) / sqrt(v + epsilon)        m, v: running statistics of the autoencoder's batch norm
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.diffusion.families.base import (
    OUTSIDE_BLOCKS,
    Denoiser,
    Encoding,
    Family,
    Joined,
    Layout,
    Signature,
    Tensors,
    even_sigmas,
    spans_in,
    within,
)

if TYPE_CHECKING:
    from torch import Tensor

_ATTENTION = r"(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj|attn\.to_out)"
"""Single stream blocks join attention and feed-forward layers: they belong to both choices."""

_OUTSIDE = rf"({OUTSIDE_BLOCKS}|.*_modulation(_img|_txt)?\.linear|time_guidance_embed\..*)"

LARGEST = 1024**2
"""Pixels to which diffusers shrinks reference pictures."""


class Flux2(Family):
    """Flux.2 [dev]; the denoiser takes the guidance as an input, and there is no negative prompt."""

    name = "flux2"
    title = "Flux.2 dev"
    short = "Flux.2"
    order = 42
    licence = "FLUX [dev] Non-Commercial License"
    pipeline = "Flux2Pipeline"
    single_file = False
    other_pipelines: ClassVar[Mapping[str, str]] = {"edit": "Flux2Pipeline"}
    components = ("vae", "transformer", "text_encoder")
    denoisers = (Denoiser("transformer"),)
    text_encoders: ClassVar[tuple[str, ...]] = ()
    batch_arguments = ("hidden_states", "timestep", "guidance", "encoder_hidden_states")
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {("encoder_hidden_states",): "embeds"}
    targets: ClassVar[Mapping[str, str]] = {
        "attention": rf".*\.{_ATTENTION}",
        "attention-mlp": rf".*\.({_ATTENTION}|ff(_context)?\.linear_(in|out))",
        "linear": rf"(?!{_OUTSIDE}$).*",
        "all": rf"(?!{OUTSIDE_BLOCKS}$).*",
    }
    layout = Layout(("text", "image", "reference"), patch=2, packed=True)
    predictions = ("flow",)
    vae_fields = ("batch_norm_eps", "batch_norm_momentum", "patch_size", "decoder_block_out_channels")
    guidance_input: ClassVar[bool] = True
    usual_steps = 28
    usual_guidance = 4.0
    signature: ClassVar[Signature] = Signature(
        adapter=r"to_qkv_mlp_proj|ff(_context)?[._]linear_(in|out)|(single|double)_stream_modulation",
        checkpoint=r"double_stream_modulation_img",
        hints=r"flux[._-]?2",
        precedence=6,
    )

    def resolution(self, pipe: Any) -> int:
        return int(pipe.default_sample_size) * self.latent_factor(pipe)

    def size_from(self, pipe: Any, image: Any) -> tuple[int, int]:
        """That of the first reference picture, which diffusers shrinks to a megapixel and crops to whole tokens."""
        return within(super().size_from(pipe, image), LARGEST, self.pixel_step(pipe))

    def timetable(self, pipe: Any, steps: int, size: tuple[int, int]) -> dict[str, Any]:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        step = self.pixel_step(pipe)
        tokens = (size[0] // step) * (size[1] // step)
        return {"sigmas": even_sigmas(steps), "mu": compute_empirical_mu(tokens, steps)}

    # ------------------------------------------------------------------ latents
    def scaled(self, pipe: Any, encoded: Tensor) -> Tensor:
        mean, deviation = _statistics(pipe, encoded)
        latents: Tensor = pipe._unpatchify_latents((pipe._patchify_latents(encoded) - mean) / deviation)
        return latents

    def unscaled(self, pipe: Any, latents: Tensor) -> Tensor:
        mean, deviation = _statistics(pipe, latents)
        encoded: Tensor = pipe._unpatchify_latents(pipe._patchify_latents(latents) * deviation + mean)
        return encoded

    def unpacked(self, pipe: Any, tokens: Tensor, height: int, width: int) -> Tensor:
        return _latents(pipe, tokens, self.grid(pipe, height, width))

    # ------------------------------------------------------------------ prompts
    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        return self.encoding({"embeds": pipe.encode_prompt(prompt, num_images_per_prompt=images)[0]}, {}, False)

    def condition(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        import torch

        with torch.no_grad():
            return {"embeds": pipe.encode_prompt(list(texts))[0]}

    def too_long(self, pipe: Any, text: str) -> bool:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        messages = format_input([text], system_message=pipe.system_message)
        return _count(pipe.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)) > self._most(pipe)

    def text_spans(self, pipe: Any, text: str) -> list[tuple[int, int]]:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        messages = format_input([text], system_message=pipe.system_message)[0]
        written = pipe.tokenizer.apply_chat_template(messages, tokenize=False)
        reader = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)  # a processor has one inside
        most = self._most(pipe)
        spans = spans_in(reader, written, text, most, special=False)
        return [(0, 0)] * (most - len(spans) if reader.padding_side == "left" else 0) + spans

    def _most(self, pipe: Any) -> int:
        """Tokens that the pipeline reads, with those of the template."""
        return int(pipe.tokenizer_max_length)

    @contextmanager
    def alone(self, pipe: Any, joined: Joined, images: int, run: Any) -> Iterator[None]:
        """The positions of each text count from 0."""
        import torch

        own, lengths = pipe._prepare_text_ids, list(joined.texts)

        def each(embeds: Tensor, *more: Any, **named: Any) -> Tensor:
            parts = torch.split(embeds, lengths, 1) if embeds.shape[1] == sum(lengths) else [embeds]
            return torch.cat([own(part, *more, **named) for part in parts], 1)

        pipe._prepare_text_ids = each
        try:
            yield
        finally:
            del pipe._prepare_text_ids

    # ------------------------------------------------------------------ denoiser
    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        import torch

        patched = pipe._patchify_latents(noisy)
        embeds = given["embeds"].to(noisy.dtype)
        guided = pipe.transformer.config.guidance_embeds
        predicted = denoiser(
            hidden_states=pipe._pack_latents(patched),
            timestep=times.to(noisy.dtype),
            guidance=torch.full((len(noisy),), guidance, device=noisy.device) if guided else None,
            encoder_hidden_states=embeds,
            txt_ids=pipe._prepare_text_ids(embeds).to(noisy.device),
            img_ids=pipe._prepare_latent_ids(patched).to(noisy.device),
            return_dict=False,
        )[0]
        return _latents(pipe, predicted, patched.shape[2:])

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        pipe = miniature.make(
            "Flux2Pipeline",
            **tiny_parts({"guidance_embeds": True, **changes}),
            text_encoder=miniature.mistral(30),
            tokenizer=miniature.mistral_tokenizer(),
        )
        return miniature.quiet(pipe)


def tiny_parts(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Denoiser, autoencoder and sampler of a miniature; ``changes`` are the denoiser's."""
    import torch

    from pipelines.diffusion.families import miniature

    values = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 3 * miniature.LANGUAGE_WIDTH,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (2, 2, 2, 2),
    }
    transformer = miniature.make("Flux2Transformer2DModel", **(values | dict(changes)))
    vae = miniature.make("AutoencoderKLFlux2", **miniature.vae_values(), patch_size=(2, 2))
    vae.bn.running_mean = torch.randn(16) * 0.3
    vae.bn.running_var = torch.rand(16) + 0.5
    scheduler = miniature.make("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler}


def _latents(pipe: Any, tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Latents (batch, channels, h, w) of tokens (batch, tokens, channels) on a grid of rows and columns."""
    batch, _, channels = tokens.shape
    latents: Tensor = pipe._unpatchify_latents(tokens.transpose(1, 2).reshape(batch, channels, *grid))
    return latents


def _count(tokens: Any) -> int:
    ids = tokens["input_ids"]
    return len(ids[0]) if isinstance(ids[0], list) else len(ids)


def _statistics(pipe: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (1, channels, 1, 1) of patched latents."""
    norm = pipe.vae.bn
    mean = norm.running_mean.view(1, -1, 1, 1).to(like)
    deviation = (norm.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps).sqrt().to(like)
    return mean, deviation


FAMILY = Flux2()
