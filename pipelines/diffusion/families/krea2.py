"""Krea 2: one stream of text and picture tokens; the text is the states of several layers of Qwen3-VL, fused by a small
transformer; flow matching on packed latents of Qwen-Image's autoencoder.

Krea 2026 (no paper; https://huggingface.co/krea/Krea-2-Raw). The pipeline's guidance g is  v + g (v - v_negative):  0
switches it off, and g stands for 1 + g elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.diffusion.families.base import (
    Denoiser,
    Encoding,
    Family,
    Layout,
    Signature,
    Tensors,
    even_sigmas,
    latent_factor,
    spans_in,
)
from pipelines.diffusion.families.flux import unpack
from pipelines.diffusion.families.qwen import VAE_FIELDS
from pipelines.diffusion.families.renaming import Rule, renamed

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats.lora import LoraFile

TOKENS = 512
"""Tokens of a prompt, filled up to this number, that diffusers' pipeline reads."""

DISTILLED_SHIFT = 1.15
"""mu of the distilled base, for every size."""

BLOCK = r"transformer_blocks\.\d+"
FUSION = r"text_fusion\.(layerwise|refiner)_blocks\.\d+"
ATTENTION = r"attn\.(to_q|to_k|to_v|to_gate|to_out\.0)"
FEED_FORWARD = r"ff\.(gate|up|down)"

_ATTENTION_NAMES = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out_0", "gate": "to_gate"}

NAMES: tuple[Rule, ...] = (
    *((rf"blocks_(\d+)_attn_{old}", (rf"transformer_blocks_\1_attn_{new}",)) for old, new in _ATTENTION_NAMES.items()),
    (r"blocks_(\d+)_mlp_(gate|up|down)", (r"transformer_blocks_\1_ff_\2",)),
    *(
        (rf"txtfusion_(layerwise|refiner)_blocks_(\d+)_attn_{old}", (rf"text_fusion_\1_blocks_\2_attn_{new}",))
        for old, new in _ATTENTION_NAMES.items()
    ),
    (r"txtfusion_(layerwise|refiner)_blocks_(\d+)_mlp_(gate|up|down)", (r"text_fusion_\1_blocks_\2_ff_\3",)),
    ("first", ("img_in",)),
    ("last_linear", ("final_layer_linear",)),
    ("tmlp_0", ("time_embed_linear_1",)),
    ("tmlp_2", ("time_embed_linear_2",)),
    ("tproj_1", ("time_mod_proj",)),
    ("txtmlp_1", ("txt_in_linear_1",)),
    ("txtmlp_3", ("txt_in_linear_2",)),
    ("txtfusion_projector", ("text_fusion_projector",)),
)
"""The authors' names, which ComfyUI and kohya write."""


class Krea2(Family):
    """Krea 2, undistilled and Turbo. Its text encoder is not trained here."""

    name = "krea2"
    title = "Krea 2"
    short = "Krea 2"
    order = 70
    licence = "Krea 2 Community License"
    pipeline = "Krea2Pipeline"
    single_file = False
    components = ("vae", "transformer", "text_encoder")
    denoisers = (Denoiser("transformer"),)
    text_encoders = ("text_encoder",)
    batch_arguments = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask")
    flat_layers = r"text_fusion\.layerwise_blocks\..*"
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {
        ("encoder_hidden_states",): "embeds",
        ("encoder_attention_mask",): "mask",
    }
    call_names: ClassVar[Mapping[str, str]] = {"embeds": "prompt_embeds", "mask": "prompt_embeds_mask"}
    targets: ClassVar[Mapping[str, str]] = {
        "attention": rf"{BLOCK}\.{ATTENTION}",
        "attention-mlp": rf"{BLOCK}\.({ATTENTION}|{FEED_FORWARD})",
        "linear": rf"({BLOCK}|{FUSION})\.({ATTENTION}|{FEED_FORWARD})",
        "all": rf"({BLOCK}|{FUSION})\.({ATTENTION}|{FEED_FORWARD})",
    }
    layout = Layout(("text", "image"), patch=2, packed=True, text_layers=r"^(text_fusion|txt_in)(\.|$)")
    text_tensors = ("embeds", "mask")
    predictions = ("flow",)
    vae_fields = VAE_FIELDS
    no_guidance = 0.0
    usual_steps = 28
    usual_guidance = 4.5
    prompt_tokens = TOKENS - 5  # the end of the chat template
    training_shift = 2.5  # exp(mu) of the base's own schedule at 1024 x 1024 pixels
    signature = Signature(
        adapter=r"text_fusion[._]|txtfusion[._]|(?<!single_)transformer_blocks[._]\d+[._](attn[._]to_gate|"
        r"ff[._](gate|up|down))"
        r"|(^|[._])blocks[._]\d+[._](attn[._]w[qkvo]|mlp[._](gate|up|down))[._]",
        checkpoint=r"(^|\.)(txtfusion|text_fusion)\.projector\.",
        hints=r"krea.?2",
        precedence=7,
    )

    def usual_of(self, name: str, config: Mapping[str, Any]) -> tuple[int, float]:
        return (8, 0.0) if config.get("is_distilled") else super().usual_of(name, config)

    def resolution(self, pipe: Any) -> int:
        return 128 * latent_factor(pipe)  # nothing in the configuration says it

    def timetable(self, pipe: Any, steps: int, size: tuple[int, int]) -> dict[str, Any]:
        usual = super().timetable(pipe, steps, size) | {"sigmas": even_sigmas(steps)}
        return usual | {"mu": DISTILLED_SHIFT} if pipe.config.is_distilled else usual

    def unpacked(self, pipe: Any, tokens: Tensor, height: int, width: int) -> Tensor:
        found: Tensor = pipe._unpack_latents(tokens, height, width)
        return found[:, :, 0]

    def named(self, file: LoraFile, pipe: Any) -> LoraFile:
        return renamed(file, self.denoiser, NAMES)

    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        device = pipe._execution_device
        found = [
            _named(*pipe.encode_prompt([text], device, images, max_sequence_length=TOKENS))
            for text in (prompt, negative or "")[: 2 if guided else 1]
        ]
        return self.encoding(found[0], found[-1], guided)

    def text_spans(self, pipe: Any, text: str) -> list[tuple[int, int]]:
        dropped, end = pipe.prompt_template_encode_start_idx, pipe.prompt_template_encode_num_suffix_tokens
        written = pipe.prompt_template_encode_prefix + text
        return spans_in(pipe.tokenizer, written, text, TOKENS + dropped - end, dropped)

    def condition(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        import torch

        with torch.no_grad():
            return _named(*pipe.encode_prompt(list(texts), max_sequence_length=TOKENS))

    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        batch, channels, height, width = noisy.shape
        predicted = denoiser(
            hidden_states=pipe._pack_latents(noisy, batch, channels, height, width),
            encoder_hidden_states=given["embeds"].to(noisy.dtype),
            timestep=times.to(noisy.dtype),
            position_ids=pipe.prepare_position_ids(given["embeds"].shape[1], height // 2, width // 2, noisy.device),
            encoder_attention_mask=given["mask"].bool(),
            return_dict=False,
        )[0]
        return unpack(predicted, height, width)

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        values = {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "timestep_embed_dim": 32,
            "text_hidden_dim": 32,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        }
        scheduler = {"use_dynamic_shifting": True, "max_image_seq_len": 6400, "max_shift": 0.55}
        pipe = miniature.make(
            "Krea2Pipeline",
            transformer=miniature.make("Krea2Transformer2DModel", **(values | changes)),
            scheduler=miniature.make("FlowMatchEulerDiscreteScheduler", **scheduler),
            vae=miniature.video_vae(),
            text_encoder=miniature.qwen3_vl(),
            tokenizer=miniature.qwen_tokenizer(),
            text_encoder_select_layers=(1, 2),
        )
        return miniature.quiet(pipe)


def _named(embeds: Tensor, mask: Tensor) -> Tensors:
    return {"embeds": embeds, "mask": mask}


FAMILY = Krea2()
