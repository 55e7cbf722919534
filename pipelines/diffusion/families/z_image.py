"""Z-Image: one stream of image and text tokens, the states of a language model (Qwen3) as text, flow matching.

Z-Image Team 2025, "Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion Transformer"
(arXiv 2511.22699). In diffusers the denoiser takes lists with one entry per sample, since captions differ in length;
its time t runs from 0 (noise) to 1 (clean), and it predicts x0 - noise, so the pipeline negates it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    even_sigmas,
)

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 512
"""Tokens of a prompt, with those of the chat template, that diffusers' pipeline reads."""

ATTENTION = r".*\.attention\.to_(q|k|v|out\.0)"
FEED_FORWARD = r".*\.feed_forward\.w[123]"
OUTSIDE = r"(all_x_embedder|all_final_layer|cap_embedder|t_embedder)\..*"
"""First and last layers."""


class ZImage(Family):
    """Z-Image and Z-Image-Turbo."""

    name = "z-image"
    title = "Z-Image"
    short = "Z-Image"
    order = 60
    licence = "Apache 2.0"
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
    targets: ClassVar[Mapping[str, str]] = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|{FEED_FORWARD}",
        "linear": rf"(?!{OUTSIDE}$).*",
        "all": rf"(?!{OUTSIDE}$).*",
    }
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
        template = pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return len(pipe.tokenizer(template, verbose=False).input_ids) > TOKENS

    def joined(self, encodings: Sequence[Encoding]) -> Joined:
        raise InputError(f"Regions inside {self.title} are not possible yet: use method 'output', with boxes or masks.")

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
            text_encoder=miniature.qwen3(),
            tokenizer=miniature.qwen_tokenizer(),
            transformer=transformer,
        )
        return miniature.quiet(pipe)


FAMILY = ZImage()
