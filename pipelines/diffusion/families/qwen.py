"""Qwen-Image with its Edit models: double stream blocks over Qwen2.5-VL's tokens and packed latents of a video VAE.

Wu et al. 2025, "Qwen-Image Technical Report" (arXiv 2508.02324). A prompt stands in a chat template, so its encoding
has as many tokens as the prompt, with a mask. Guidance is a second pass, after which the pipeline restores the norm of
each token. Edit models read the picture together with the prompt, and append its tokens to those of the latents.
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
    latent_factor,
    spans_in,
)
from pipelines.diffusion.families.flux import unpack

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 512
"""Tokens of a prompt that diffusers' pipeline reads by default."""

NOTHING = " "
"""The negative prompt if none is given, as in the authors' examples."""

ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out)"
FEED_FORWARD = r"(img|txt)_mlp\.net\.(0\.proj|2)"
MODULATION = r"(img|txt)_mod\.1"

TARGETS = {
    "attention": rf"transformer_blocks\.\d+\.{ATTENTION}",
    "attention-mlp": rf"transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD})",
    "linear": rf"transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD}|{MODULATION})",
    "all": rf"transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD}|{MODULATION})",
}

VAE_FIELDS = (
    "latents_mean", "latents_std", "base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales",
    "temperal_downsample", "dropout", "input_channels",
)  # fmt: skip
"""Fields of the video autoencoder's configuration."""

EDIT, EDIT_PLUS = "QwenImageEditPipeline", "QwenImageEditPlusPipeline"


class QwenImage(Family):
    """Qwen-Image; latents are packed two by two into tokens. Its text encoder is not trained here."""

    name = "qwen"
    title = "Qwen-Image"
    short = "Qwen"
    order = 60
    licence = "Apache 2.0"
    pipeline = "QwenImagePipeline"
    other_pipelines: ClassVar[Mapping[str, str]] = {
        "image": "QwenImageImg2ImgPipeline",
        "inpaint": "QwenImageInpaintPipeline",
        "controlnet": "QwenImageControlNetPipeline",
        "controlnet inpaint": "QwenImageControlNetInpaintPipeline",
        "edit": EDIT,
        "edit plus": EDIT_PLUS,
        "edit inpaint": "QwenImageEditInpaintPipeline",
    }
    bases = (EDIT, EDIT_PLUS)
    editing = (EDIT, EDIT_PLUS, "QwenImageEditInpaintPipeline")
    single_file = False
    controlnet = "QwenImageControlNetModel"
    components = ("vae", "transformer", "text_encoder")
    denoisers = (Denoiser("transformer"),)
    text_encoders = ("text_encoder",)
    batch_arguments = (
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "encoder_hidden_states_mask",
        "controlnet_block_samples",
    )
    list_arguments = ("img_shapes",)
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {
        ("encoder_hidden_states",): "embeds",
        ("encoder_hidden_states_mask",): "mask",
    }
    call_names: ClassVar[Mapping[str, str]] = {"embeds": "prompt_embeds", "mask": "prompt_embeds_mask"}
    targets = TARGETS
    layout = Layout(
        ("text", "image", "reference"), patch=2, packed=True,
        text_layers=r"(^|\.)(add_[qkv]_proj|to_add_out|txt_mlp|txt_mod|txt_in)(\.|$)",
    )  # fmt: skip
    text_tensors = ("embeds", "mask")
    predictions = ("flow",)
    vae_fields = VAE_FIELDS
    denoiser_inputs: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "guidance_embeds": (False, None),
        "use_additional_t_cond": (False, None),
        "use_layer3d_rope": (False, None),
    }
    guidance_argument = "true_cfg_scale"
    usual_guidance = 4.0
    prompt_tokens = TOKENS
    training_shift = 2.2
    signature = Signature(
        adapter=r"(?<!single_)transformer_blocks[._](\d+[._](img|txt)_(mlp|mod)[._]|[45]\d[._]attn[._])",
        checkpoint=r"(^|\.)transformer_blocks\.\d+\.(img|txt)_mod\.1\.",
        hints=r"qwen.?image",
        precedence=4,
    )

    def tasks(self, pipe: Any) -> Mapping[str, str]:
        kind = type(pipe).__name__
        if kind not in self.bases:
            return self.other_pipelines
        others = {"inpaint": "QwenImageEditInpaintPipeline"} if kind == EDIT else {}
        return {"image": kind, "edit": kind, **others}

    def guidance_arguments(self, scale: float, negative: str = "") -> dict[str, Any]:
        return super().guidance_arguments(scale, negative or NOTHING)

    def resolution(self, pipe: Any) -> int:
        return int(pipe.default_sample_size) * latent_factor(pipe)

    def size_from(self, pipe: Any, image: Any) -> tuple[int, int]:
        if type(pipe).__name__ not in (EDIT, EDIT_PLUS):
            return super().size_from(pipe, image)
        width, height = _sides(pipe, image[-1] if isinstance(image, list) else image, 1024 * 1024)
        step = self.pixel_step(pipe)
        return height // step * step, width // step * step

    def timetable(self, pipe: Any, steps: int, size: tuple[int, int]) -> dict[str, Any]:
        return super().timetable(pipe, steps, size) | {"sigmas": even_sigmas(steps)}

    def unpacked(self, pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
        return super().unpacked(pipe, latents, height, width)[:, :, 0]

    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        device = pipe._execution_device
        found = [
            _whole(*pipe.encode_prompt(text, device=device, num_images_per_prompt=images, max_sequence_length=TOKENS))
            for text in (prompt, negative or NOTHING)[: 2 if guided else 1]
        ]
        return self.encoding(found[0], found[-1], guided)

    def encode_seen(
        self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool, image: Any
    ) -> Encoding:
        pictures = [
            pipe.image_processor.resize(one, *reversed(_sides(pipe, one, _area(pipe))))
            for one in (image if isinstance(image, list) else [image])
        ]
        seen = pictures if type(pipe).__name__ == EDIT_PLUS or isinstance(image, list) else pictures[0]
        device = pipe._execution_device
        found = [
            _whole(*pipe.encode_prompt(text, image=seen, device=device, num_images_per_prompt=images))
            for text in (prompt, negative or NOTHING)[: 2 if guided else 1]
        ]
        return self.encoding(found[0], found[-1], guided)

    def condition(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        import torch

        with torch.no_grad():
            return _whole(*pipe.encode_prompt(list(texts), max_sequence_length=TOKENS))

    def null_condition(self, pipe: Any, text: str = "") -> Tensors:
        return self.condition(pipe, [text or NOTHING])

    def text_spans(self, pipe: Any, text: str) -> list[tuple[int, int]]:
        if self.edits(pipe):  # the picture's tokens stand before the text
            return super().text_spans(pipe, text)
        dropped = pipe.prompt_template_encode_start_idx
        written = pipe.prompt_template_encode.format(text)
        return spans_in(pipe.tokenizer, written, text, TOKENS + dropped, dropped)

    @contextmanager
    def alone(self, pipe: Any, joined: Joined, images: int, run: Any) -> Iterator[None]:
        import torch

        places = pipe.transformer.pos_embed
        own = places.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            picture, text = own(*args, **kwargs)
            return picture, torch.cat([text[:length] for length in joined.texts])

        places.forward = forward
        try:
            yield
        finally:
            del places.forward

    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        batch, channels, height, width = noisy.shape
        predicted = denoiser(
            hidden_states=pipe._pack_latents(noisy, batch, channels, height, width),
            timestep=times.to(noisy.dtype),
            encoder_hidden_states=given["embeds"].to(noisy.dtype),
            encoder_hidden_states_mask=None if bool(given["mask"].all()) else given["mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        return unpack(predicted, height, width)

    def most_together(self, pipe: Any) -> int | None:
        # Edit-2511 puts a second batch (at noise level 0, for the reference's tokens) behind the first one
        return 1 if pipe.transformer.config.get("zero_cond_t") else None

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        values = {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        }
        pipe = miniature.make(
            "QwenImagePipeline",
            transformer=miniature.make("QwenImageTransformer2DModel", **(values | changes)),
            scheduler=miniature.make("FlowMatchEulerDiscreteScheduler", **SCHEDULER),
            vae=miniature.video_vae(),
            text_encoder=miniature.qwen_vl(),
            tokenizer=miniature.qwen_tokenizer(),
        )
        return miniature.quiet(pipe)

    def tiny_edit(self, kind: str, seed: int = 0, **changes: Any) -> Any:
        """The miniature as a base of class ``kind`` that edits pictures."""
        from pipelines.diffusion.families import miniature

        parts = self.tiny(seed, **changes).components
        return miniature.quiet(miniature.make(kind, **parts, processor=miniature.QwenReader()))


SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
"""Configuration of the published scheduler."""


def _whole(embeds: Tensor, mask: Tensor | None) -> Tensors:
    """The pipeline's encoding with its mask, which it leaves out where it hides nothing."""
    return {"embeds": embeds, "mask": embeds.new_ones(embeds.shape[:2]).long() if mask is None else mask}


def _area(pipe: Any) -> int:
    """Pixels of the picture that the text encoder sees."""
    import sys

    module = sys.modules[type(pipe).__module__]
    return int(getattr(module, "CONDITION_IMAGE_SIZE", 1024 * 1024))


def _sides(pipe: Any, picture: Any, area: int) -> tuple[int, int]:
    """Width and height that the pipeline chooses for a picture of this area."""
    import sys

    module: Any = sys.modules[type(pipe).__module__]
    width, height = picture.size
    sides = module.calculate_dimensions(area, width / height)
    return sides[0], sides[1]


FAMILY = QwenImage()
