"""ERNIE-Image: one stream of image and text tokens, the states of a language model (Mistral 3) as text, flow matching.

Baidu 2026 (no paper of its own; https://github.com/PaddlePaddle/ERNIE-Image). Its autoencoder is Flux.2's: latents are
patches of 2 x 2 cells, normalised per channel by the running statistics m, v of a batch normalisation:

    x = (patch(z) - m) / sqrt(v + 1e-5)

Inside the denoiser the feed-forward layers have the tokens in front and the batch second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.diffusion.families.base import (
    Denoiser,
    Encoding,
    Family,
    Joined,
    Layout,
    Signature,
    Tensors,
    even_sigmas,
    joined_texts,
    layer_choices,
    places_before,
    spans_in,
)

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION = r".*\.self_attention\.to_(q|k|v|out\.0)"
FEED_FORWARD = r".*\.mlp\.(gate_proj|up_proj|linear_fc2)"
OUTSIDE = r"(x_embedder.*|text_proj|time_embedding.*|final_norm.*|final_linear)"
"""First and last layers."""

SMALLEST = 1e-5
"""Added to the variances by diffusers' pipeline, whatever the autoencoder's configuration says."""


class ErnieImage(Family):
    """ERNIE-Image; prompts are used as they are written (the pipeline's own model for rewriting them is not used)."""

    name = "ernie-image"
    title = "ERNIE-Image"
    short = "ERNIE-Image"
    order = 95
    licence = "Apache 2.0"
    single_file = False
    pipeline = "ErnieImagePipeline"
    components = ("vae", "transformer", "text_encoder")
    denoisers = (Denoiser("transformer"),)
    text_encoders = ()
    batch_arguments = ("hidden_states", "timestep", "text_bth", "text_lens")
    flat_layers = r"layers\.\d+\.mlp\..*|final_linear"
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {("text_bth",): "embeds", ("text_lens",): "lengths"}
    call_names: ClassVar[Mapping[str, str]] = {"embeds": "prompt_embeds"}
    targets = layer_choices(ATTENTION, FEED_FORWARD, OUTSIDE)
    layout = Layout(("image", "text"), text_layers=r"^text_proj$", in_front=r"\.mlp\.|^final_linear$")
    predictions = ("flow",)
    vae_fields = ("batch_norm_eps", "batch_norm_momentum", "patch_size", "decoder_block_out_channels")
    signature = Signature(
        adapter=r"layers[._]\d+[._](self_attention[._]to_(q|k|v|out)|mlp[._](gate_proj|up_proj|linear_fc2))",
        checkpoint=r"(^|\.)layers\.\d+\.self_attention\.to_q\.weight",
        hints=r"ernie.?image",
        precedence=4,
    )

    # ------------------------------------------------------------------ sizes and latents
    def resolution(self, pipe: Any) -> int:
        """The size in the VAE's configuration; the transformer's has none."""
        return int(pipe.vae.config.sample_size)

    def input_channels(self, pipe: Any) -> int:
        return 4 * super().input_channels(pipe)

    def latent_factor(self, pipe: Any) -> int:
        return 2 * super().latent_factor(pipe)

    def moments(self, pipe: Any, pixels: Tensor) -> Tensor:
        import torch

        found = super().moments(pipe, pixels)
        return torch.stack([pipe._patchify_latents(part) for part in found.unbind(1)], 1)

    def scaled(self, pipe: Any, encoded: Tensor) -> Tensor:
        mean, deviation = _statistics(pipe, encoded)
        return (encoded - mean) / deviation

    def unscaled(self, pipe: Any, latents: Tensor) -> Tensor:
        mean, deviation = _statistics(pipe, latents)
        encoded: Tensor = pipe._unpatchify_latents(latents * deviation + mean)
        return encoded

    def timetable(self, pipe: Any, steps: int, size: tuple[int, int]) -> dict[str, Any]:
        return {"sigmas": even_sigmas(steps)}

    # ------------------------------------------------------------------ prompts
    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        device = pipe._execution_device
        positive = pipe.encode_prompt(prompt, device, images)
        negatives = pipe.encode_prompt(negative or "", device, images) if guided else []
        return self.encoding({"embeds": positive}, {"embeds": negatives}, guided)

    def passed(self, texts: Mapping[str, Any]) -> Mapping[str, Any]:
        """The texts of a batch, filled with zeros, and their lengths."""
        import torch

        found = texts["embeds"]
        lengths = torch.tensor([len(text) for text in found], device=found[0].device)
        return {"embeds": torch.nn.utils.rnn.pad_sequence(found, batch_first=True), "lengths": lengths}

    def condition(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        return dict(self.passed({"embeds": pipe.encode_prompt(list(texts), pipe._execution_device)}))

    def text_spans(self, pipe: Any, text: str) -> list[tuple[int, int]]:
        return spans_in(pipe.tokenizer, text, text, pipe.tokenizer.model_max_length)

    def joined(self, encodings: Sequence[Encoding]) -> Joined:
        positive, negative, texts, own = joined_texts(encodings, lambda half: half["embeds"])
        return Joined(self.encoding({"embeds": positive}, {"embeds": negative}, bool(negative)), texts, own)

    @contextmanager
    def alone(self, pipe: Any, joined: Joined, images: int, run: Any) -> Iterator[None]:
        """Places count here, not only distances, since the rotary embedding is no rotation (both parts of a pair have
        angles of their own): the longest text that a cell sees stands as it does alone, shorter ones end where it ends.
        """

        def separated(module: Any, args: Any) -> Any:
            ids = args[0].clone()
            cells = ids.shape[1] - sum(joined.texts)
            for sample in range(len(ids)):
                half = 1 - sample // images if len(ids) > images else 0  # the negative half comes first
                places, image = places_before(joined, half, run.seen)
                ids[sample, :cells, 0] = image
                ids[sample, cells:, 0] = places.to(ids)
            return (ids,)

        handle = pipe.transformer.pos_embed.register_forward_pre_hook(separated)
        try:
            yield
        finally:
            handle.remove()

    # ------------------------------------------------------------------ denoiser
    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        predicted: Tensor = denoiser(
            hidden_states=noisy,
            timestep=times.to(noisy.dtype) * 1000,
            text_bth=given["embeds"].to(noisy.dtype),
            text_lens=given["lengths"],
            return_dict=False,
        )[0]
        return predicted

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        values = {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "in_channels": 16,
            "out_channels": 16,
            "text_in_dim": 24,
            "rope_axes_dim": (4, 6, 6),
        }
        transformer = miniature.make("ErnieImageTransformer2DModel", **(values | changes))
        for layer in (transformer.adaLN_modulation[-1], transformer.final_linear):  # they start at zero
            torch.nn.init.normal_(layer.weight, std=0.2)
        vae = miniature.make("AutoencoderKLFlux2", **miniature.vae_values())
        vae.bn.running_mean.normal_(std=0.3)
        vae.bn.running_var.uniform_(0.5, 1.5)
        tokenizer = miniature.marked_tokenizer("<s>")
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = miniature.make(
            "Mistral3Config",
            text_config={
                "model_type": "mistral", "vocab_size": len(tokenizer), "num_key_value_heads": 1, "head_dim": 12, **text
            },
            vision_config={"model_type": "pixtral", **vision, "image_size": 32, "patch_size": 16},
            image_token_index=1,
        )  # fmt: skip
        pipe = miniature.make(
            "ErnieImagePipeline",
            transformer=transformer,
            vae=vae,
            text_encoder=miniature.make("Mistral3Model", config),
            tokenizer=tokenizer,
            scheduler=miniature.make("FlowMatchEulerDiscreteScheduler", shift=4.0),
        )
        return miniature.quiet(pipe)


def _statistics(pipe: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (1, channels, 1, 1) of the latents."""
    norm = pipe.vae.bn
    deviation = (norm.running_var + SMALLEST).sqrt()
    return norm.running_mean.view(1, -1, 1, 1).to(like), deviation.view(1, -1, 1, 1).to(like)


FAMILY = ErnieImage()
