"""Lumina Image 2.0: one stream of text and image tokens, the states of a language model (Gemma 2) as text.

Qin et al. 2025, "Lumina-Image 2.0: A Unified and Efficient Image Generative Framework" (arXiv 2503.21758). Its time
runs from 0 (noise) to 1 (clean) and it predicts x0 - noise, so the pipeline negates it.
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
    shift,
    spans_in,
)
from pipelines.diffusion.families.renaming import Rule, renamed

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats.lora import LoraFile

TOKENS = 256
"""Tokens of a prompt, with the instruction before it, that diffusers' pipeline reads."""

ATTENTION = r".*\.attn\.to_(q|k|v|out\.0)"
FEED_FORWARD = r".*\.feed_forward\.linear_[123]"
OUTSIDE = r"(x_embedder|time_caption_embed.*|norm_out.*)"
"""First and last layers."""


NAMES: tuple[Rule, ...] = (
    (r"final_layer_adaLN_modulation_1", ("norm_out_linear_1",)),
    (r"final_layer_linear", ("norm_out_linear_2",)),
    (r"(.+_\d+)_attention_qkv", (r"\1_attn_to_q", r"\1_attn_to_k", r"\1_attn_to_v")),
    (r"(.+_\d+)_attention_out", (r"\1_attn_to_out_0",)),
    (r"(.+_\d+_feed_forward)_w([123])", (r"\1_linear_\2",)),
    (r"(.+_\d+)_adaLN_modulation_1", (r"\1_norm1_linear",)),
    (r"cap_embedder_1", ("time_caption_embed_caption_embedder_1",)),
    (r"t_embedder_mlp_0", ("time_caption_embed_timestep_embedder_linear_1",)),
    (r"t_embedder_mlp_2", ("time_caption_embed_timestep_embedder_linear_2",)),
)
"""The authors' names, which ComfyUI and kohya write."""


class Lumina2(Family):
    """Lumina Image 2.0."""

    name = "lumina2"
    title = "Lumina Image 2.0"
    short = "Lumina 2"
    order = 70
    licence = "Apache 2.0"
    single_file = False
    pipeline = "Lumina2Pipeline"
    components = ("vae", "transformer", "text_encoder")
    denoisers = (Denoiser("transformer"),)
    text_encoders = ()
    batch_arguments = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {
        ("encoder_hidden_states",): "embeds",
        ("encoder_attention_mask",): "mask",
    }
    call_names: ClassVar[Mapping[str, str]] = {"embeds": "prompt_embeds", "mask": "prompt_attention_mask"}
    targets = layer_choices(ATTENTION, FEED_FORWARD, OUTSIDE)
    layout = Layout(("text", "image"), patch=2, text_layers=r"(^|\.)(context_refiner|caption_embedder)\.")
    predictions = ("flow",)
    positive_first = True
    vae_fields = ("shift_factor",)
    signature = Signature(
        adapter=r"(noise_refiner|context_refiner|(^|\.|unet_)layers)[._]\d+[._](attn[._]to_|feed_forward[._]linear_[123]|"
        r"norm1[._]linear|adaLN_modulation[._]1[._])",
        checkpoint=r"(^|\.)cap_embedder\.0\.weight|time_caption_embed\.",
        hints=r"lumina.?(image.?)?2",
        precedence=7,
    )

    def named(self, file: LoraFile, pipe: Any) -> LoraFile:
        return renamed(file, self.denoiser, NAMES)

    def timetable(self, pipe: Any, steps: int, size: tuple[int, int]) -> dict[str, Any]:
        usual = super().timetable(pipe, steps, size) | {"sigmas": even_sigmas(steps)}
        if "mu" in usual:  # diffusers' pipeline counts channels instead of tokens
            usual["mu"] = shift(pipe.scheduler, pipe.transformer.config.in_channels)
        return usual

    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        embeds, mask, others, other_mask = pipe.encode_prompt(prompt, guided, negative, images)
        return self.encoding({"embeds": embeds, "mask": mask}, {"embeds": others, "mask": other_mask}, guided)

    def condition(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        """As the pipeline encodes prompts; an empty text as its empty negative prompt, without instruction."""
        import torch

        written = [f"{pipe.system_prompt} <Prompt Start> {text}" if text else "" for text in texts]
        with torch.no_grad():
            embeds, mask = pipe._get_gemma_prompt_embeds(written)
        return {"embeds": embeds, "mask": mask}

    def text_spans(self, pipe: Any, text: str) -> list[tuple[int, int]]:
        return spans_in(pipe.tokenizer, f"{pipe.system_prompt} <Prompt Start> {text}", text, TOKENS)

    def joined(self, encodings: Sequence[Encoding]) -> Joined:
        import torch

        def read(half: Mapping[str, Any]) -> list[Tensor]:
            return [text[mask.bool()] for text, mask in zip(half["embeds"], half["mask"], strict=True)]

        *halves, texts, own = joined_texts(encodings, read)
        given = [{"embeds": torch.stack(half), "mask": half[0].new_ones(len(half), sum(texts), dtype=torch.long)}
                 if half else {} for half in halves]  # fmt: skip
        return Joined(self.encoding(given[0], given[1], bool(given[1])), texts, own)

    @contextmanager
    def alone(self, pipe: Any, joined: Joined, images: int, run: Any) -> Iterator[None]:
        embedder = pipe.transformer.rope_embedder
        own = embedder._get_freqs_cis

        def separated(ids: Tensor) -> Any:
            places, image = places_before(joined, run.half)
            ids = ids.clone()
            ids[:, : len(places), 0] = places.to(ids)
            ids[:, len(places) :, 0] = image
            return own(ids)

        embedder._get_freqs_cis = separated
        try:
            yield
        finally:
            del embedder._get_freqs_cis

    def too_long(self, pipe: Any, text: str) -> bool:
        written = f"{pipe.system_prompt} <Prompt Start> {text}"
        return len(pipe.tokenizer(written, verbose=False).input_ids) > TOKENS

    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        predicted: Tensor = denoiser(
            hidden_states=noisy,
            timestep=1 - times.float(),
            encoder_hidden_states=given["embeds"].to(noisy.dtype),
            encoder_attention_mask=given["mask"],
            return_dict=False,
        )[0]
        return -predicted

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        values = {
            "sample_size": 4,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (300, 32, 32),
            "cap_feat_dim": 32,
        }
        tokenizer = miniature.marked_tokenizer("<bos>")
        pipe = miniature.make(
            "Lumina2Pipeline",
            transformer=miniature.make("Lumina2Transformer2DModel", **(values | changes)),
            scheduler=miniature.make("FlowMatchEulerDiscreteScheduler", shift=6.0),
            vae=miniature.vae(levels=4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=miniature.language_model("Gemma2", tokenizer, query_pre_attn_scalar=16),
            tokenizer=tokenizer,
        )
        return miniature.quiet(pipe)


FAMILY = Lumina2()
