"""Chroma: Flux without pooled text, guidance and modulation layers; real guidance, and a mask of the text's padding.

Lodestone Rock 2025 (no paper; https://huggingface.co/lodestones/Chroma1-HD). One network makes the modulations of all
blocks from the time. T5 reads the text with its mask, and the transformer sees one token of padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.diffusion.families.base import OUTSIDE_BLOCKS, TARGETS, Encoding, Signature, Tensors, t5_length
from pipelines.diffusion.families.flux import T5_TOKENS, Flux, unpack
from pipelines.diffusion.families.reading import Reader, Tokenized, states

if TYPE_CHECKING:
    from torch import Tensor

_OUTSIDE = rf"({OUTSIDE_BLOCKS}|distilled_guidance_layer\..*)"


class Chroma(Flux):
    """Chroma 1; the denoiser is called once per half of the guidance."""

    name = "chroma"
    title = "Chroma"
    short = "Chroma"
    order = 46
    licence = "Apache 2.0"
    pipeline = "ChromaPipeline"
    other_pipelines: ClassVar[Mapping[str, str]] = {
        "image": "ChromaImg2ImgPipeline",
    }
    controlnet = ""
    components = ("vae", "transformer", "text_encoder")
    text_encoders: ClassVar[tuple[str, ...]] = ()
    batch_arguments = ("hidden_states", "timestep", "encoder_hidden_states", "attention_mask")
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {
        ("encoder_hidden_states",): "embeds",
        ("attention_mask",): "mask",
    }
    call_names: ClassVar[Mapping[str, str]] = {"embeds": "prompt_embeds", "mask": "prompt_attention_mask"}
    text_tensors = ("embeds", "mask")
    targets: ClassVar[Mapping[str, str]] = {**TARGETS, "linear": rf"(?!{_OUTSIDE}$).*"}
    guidance_input = False
    usual_steps = 35
    signature = Signature(
        adapter=r"distilled_guidance_layer", checkpoint=r"distilled_guidance_layer", hints=r"chroma", precedence=5
    )

    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        device = pipe._execution_device
        embeds, _, mask, other, _, other_mask = pipe.encode_prompt(prompt, negative, device, images, None, None, None,
                                                                   None, guided)  # fmt: skip
        return self.encoding({"embeds": embeds, "mask": mask}, {"embeds": other, "mask": other_mask}, guided)

    def condition(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        import torch

        with torch.no_grad():
            embeds, _, mask, *_ = pipe.encode_prompt(
                list(texts),
                do_classifier_free_guidance=False,
                max_sequence_length=t5_length(pipe.tokenizer, T5_TOKENS),
            )
        return {"embeds": embeds, "mask": mask}

    def readers(self, pipe: Any) -> list[Reader]:
        return [Reader("text_encoder", "t5", T5_TOKENS, 1)]

    def encode_tokenized(self, pipe: Any, tokens: Mapping[str, Tokenized]) -> Tensors:
        import torch

        its = tokens["text_encoder"]
        embeds = states(pipe, "text_encoder", its, masked=True)[0]
        places = torch.arange(embeds.shape[1], device=embeds.device)
        mask = places[None] <= its.mask.sum().to(embeds.device)
        return {"embeds": embeds, "mask": mask.to(embeds.dtype)}

    def argument(self, kind: str, value: Any, given: Any) -> Any:
        """The mask is continued over the picture's tokens."""
        if kind != "mask":
            return value
        return pad(value, given.shape[1] - value.shape[1])

    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        import torch

        batch, channels, height, width = noisy.shape
        cells = height // 2 * (width // 2)
        predicted = denoiser(
            hidden_states=pipe._pack_latents(noisy, batch, channels, height, width),
            timestep=times.to(noisy.dtype),
            encoder_hidden_states=given["embeds"].to(noisy.dtype),
            txt_ids=torch.zeros(given["embeds"].shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=pipe._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype),
            attention_mask=pad(given["mask"].to(noisy.dtype), cells),
            return_dict=False,
        )[0]
        return unpack(predicted, height, width)

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        values = {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": (2, 2, 4),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        }
        pipe = miniature.make(
            "ChromaPipeline",
            transformer=miniature.make("ChromaTransformer2DModel", **(values | changes)),
            scheduler=miniature.make("FlowMatchEulerDiscreteScheduler"),
            vae=miniature.vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=miniature.t5(),
            tokenizer=miniature.t5_tokenizer(),
        )
        return miniature.quiet(pipe)


def pad(mask: Tensor, cells: int) -> Tensor:
    """A mask of the text (batch, tokens) continued by ones for the picture's ``cells``."""
    import torch

    return torch.cat([mask, mask.new_ones(len(mask), cells)], 1)


FAMILY = Chroma()
