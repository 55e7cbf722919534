"""Z-Image: one stream of image and text tokens, the states of a language model (Qwen3) as text, flow matching.

Z-Image Team 2025, "Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion Transformer"
(arXiv 2511.22699). In diffusers the denoiser takes lists with one entry per sample, since captions differ in length;
its time t runs from 0 (noise) to 1 (clean), and it predicts x0 - noise, so the pipeline negates it.
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
    spans_in,
)
from pipelines.diffusion.families.renaming import Rule, renamed

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats.lora import LoraFile

TOKENS = 512
"""Tokens of a prompt, with those of the chat template, that diffusers' pipeline reads."""

ATTENTION = r".*\.attention\.to_(q|k|v|out\.0)"
FEED_FORWARD = r".*\.feed_forward\.w[123]"
OUTSIDE = r"(all_x_embedder|all_final_layer|cap_embedder|t_embedder)\..*"
"""First and last layers."""


NAMES: tuple[Rule, ...] = (
    (r"(.+_\d+_attention)_qkv", (r"\1_to_q", r"\1_to_k", r"\1_to_v")),
    (r"(.+_\d+_attention)_(?:to_)?out", (r"\1_to_out_0",)),
    (r"x_embedder", ("all_x_embedder_2-1",)),
    (r"final_layer_(.+)", (r"all_final_layer_2-1_\1",)),
)
"""The authors' names, which ComfyUI and kohya write."""


class ZImage(Family):
    """Z-Image and Z-Image-Turbo."""

    name = "z-image"
    title = "Z-Image"
    short = "Z-Image"
    order = 60
    licence = "Apache 2.0"
    checked = "the embedded base, tiny random models"
    pipeline = "ZImagePipeline"
    other_pipelines: ClassVar[Mapping[str, str]] = {
        "image": "ZImageImg2ImgPipeline",
        "inpaint": "ZImageInpaintPipeline",
    }
    components = ("vae", "transformer", "text_encoder")
    denoisers = (Denoiser("transformer"),)
    text_encoders = ()
    positional = ("x", "t", "cap_feats")
    batch_arguments = ("t",)
    list_arguments = ("x", "cap_feats")
    flat_layers = r"(all_x_embedder|cap_embedder)\..*"
    positive_first = True
    no_guidance = 0.0
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {("cap_feats",): "embeds"}
    call_names: ClassVar[Mapping[str, str]] = {"embeds": "prompt_embeds"}
    targets = layer_choices(ATTENTION, FEED_FORWARD, OUTSIDE)
    layout = Layout(("image", "text"), patch=2, multiple=32)
    predictions = ("flow",)
    vae_fields = ("shift_factor",)
    signature = Signature(
        adapter=r"(noise|context)_refiner[._]\d+[._]attention|layers[._]\d+[._](attention[._](to_[qkvo]|qkv|out)|"
        r"feed_forward[._]w[123]|adaLN_modulation[._]0[._])",
        checkpoint=r"(^|\.)layers\.\d+\.adaLN_modulation\.0\.weight",
        hints=r"z.?image",
        precedence=6,
    )

    def resolution(self, pipe: Any) -> int:
        """The size in the VAE's configuration; the transformer's has none."""
        return int(pipe.vae.config.sample_size)

    def timetable(self, pipe: Any, steps: int, size: tuple[int, int]) -> dict[str, Any]:
        return super().timetable(pipe, steps, size) | {"sigmas": even_sigmas(steps)}

    def named(self, file: LoraFile, pipe: Any) -> LoraFile:
        return renamed(file, self.denoiser, NAMES)

    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        positive, negatives = pipe.encode_prompt(prompt, None, guided, negative)
        return self.encoding({"embeds": positive * images}, {"embeds": negatives * images}, guided)

    def condition(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        import torch

        with torch.no_grad():
            found, _ = pipe.encode_prompt(list(texts), None, False)
        embeds = torch.stack([torch.nn.functional.pad(text, (0, 0, 0, TOKENS - len(text))) for text in found])
        lengths = torch.tensor([len(text) for text in found], device=embeds.device)
        return {"embeds": embeds, "mask": torch.arange(TOKENS, device=embeds.device) < lengths[:, None]}

    def too_long(self, pipe: Any, text: str) -> bool:
        return len(pipe.tokenizer(_written(pipe, text), verbose=False).input_ids) > TOKENS

    def text_spans(self, pipe: Any, text: str) -> list[tuple[int, int]]:
        return spans_in(pipe.tokenizer, _written(pipe, text), text, TOKENS)

    def joined(self, encodings: Sequence[Encoding]) -> Joined:
        positive, negative, texts, own = joined_texts(encodings, lambda half: half["embeds"], self.layout.multiple)
        return Joined(self.encoding({"embeds": positive}, {"embeds": negative}, bool(negative)), texts, own)

    @contextmanager
    def alone(self, pipe: Any, joined: Joined, images: int, run: Any) -> Iterator[None]:
        """Each text ends, with its padding, one position before the image, as it does alone."""
        model = pipe.transformer
        own = model.patchify_and_embed

        def separated(images_: Sequence[Tensor], *more: Any) -> tuple[Any, ...]:
            made = own(images_, *more)
            image_ids, text_ids, padding = made[3], made[4], made[6]
            for sample in range(len(images_)):
                lengths = joined.own[min(sample // images, len(joined.own) - 1)]
                begin = 1 + max(map(self._padded, lengths))
                tokens = [
                    (length, k) for length, common in zip(lengths, joined.texts, strict=True) for k in range(common)
                ]
                text_ids[sample] = text_ids[sample].new_tensor(
                    [(begin - self._padded(length) + k, 0, 0) for length, k in tokens]
                )
                padding[sample] = padding[sample].new_tensor([k >= length for length, k in tokens])
                ids = image_ids[sample].clone()
                ids[ids[:, 0] > 0, 0] = begin
                image_ids[sample] = ids
            return made  # type: ignore[no-any-return]

        model.patchify_and_embed = separated
        try:
            yield
        finally:
            del model.patchify_and_embed

    def _padded(self, tokens: int) -> int:
        """Tokens of a text with its padding."""
        return tokens + -tokens % self.layout.multiple

    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        import torch

        texts = [
            text if mask.is_meta else text[mask]  # on the meta device all tokens count
            for text, mask in zip(given["embeds"].to(noisy.dtype), given["mask"].bool(), strict=True)
        ]
        predicted = denoiser(list(noisy[:, :, None].unbind()), 1 - times.float(), texts, return_dict=False)[0]
        return -torch.stack(predicted)[:, :, 0]

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        values = {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 32,
            "axes_dims": [4, 6, 6],
            "axes_lens": [1024, 64, 64],
        }
        transformer = miniature.make("ZImageTransformer2DModel", **(values | changes))
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            torch.nn.init.normal_(token, std=0.02)
        pipe = miniature.make(
            "ZImagePipeline",
            scheduler=miniature.make("FlowMatchEulerDiscreteScheduler", shift=3.0),
            vae=miniature.vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=miniature.language_model("Qwen3", miniature.qwen_tokenizer()),
            tokenizer=miniature.qwen_tokenizer(),
            transformer=transformer,
        )
        return miniature.quiet(pipe)


def _written(pipe: Any, text: str) -> str:
    """A prompt in the chat template."""
    written: str = pipe.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return written


FAMILY = ZImage()
