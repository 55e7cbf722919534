"""AuraFlow: joint and single blocks over T5's tokens and the image's, flow matching. Before the text stand 8 learned
register tokens.

fal 2024 (no paper; https://blog.fal.ai/auraflow). The text encoder is UMT5 (pile-t5-xl); padding is hidden from it and
its states there are zero, so the denoiser needs no mask.
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
    layer_choices,
)
from pipelines.diffusion.families.reading import Reader, Tokenized, states
from pipelines.diffusion.families.renaming import Rule, renamed

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats.lora import LoraFile

TOKENS = 256
"""Tokens of a prompt that diffusers' pipeline reads."""

ATTENTION = r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out)"
FEED_FORWARD = r".*\.(ff|ff_context)\.(linear_[12]|out_projection)"
OUTSIDE = r"(pos_embed.*|context_embedder|time_step_embed.*|time_step_proj.*|norm_out.*|proj_out)"
"""First and last layers."""


NAMES: tuple[Rule, ...] = (
    (r"double_layers_(\d+)_attn_w2([qkv])", (r"joint_transformer_blocks_\1_attn_to_\2",)),
    (r"double_layers_(\d+)_attn_w2o", (r"joint_transformer_blocks_\1_attn_to_out_0",)),
    (r"double_layers_(\d+)_attn_w1([qkv])", (r"joint_transformer_blocks_\1_attn_add_\2_proj",)),
    (r"double_layers_(\d+)_attn_w1o", (r"joint_transformer_blocks_\1_attn_to_add_out",)),
    (r"double_layers_(\d+)_mlpX_c_fc([12])", (r"joint_transformer_blocks_\1_ff_linear_\2",)),
    (r"double_layers_(\d+)_mlpX_c_proj", (r"joint_transformer_blocks_\1_ff_out_projection",)),
    (r"double_layers_(\d+)_mlpC_c_fc([12])", (r"joint_transformer_blocks_\1_ff_context_linear_\2",)),
    (r"double_layers_(\d+)_mlpC_c_proj", (r"joint_transformer_blocks_\1_ff_context_out_projection",)),
    (r"double_layers_(\d+)_modX_1", (r"joint_transformer_blocks_\1_norm1_linear",)),
    (r"double_layers_(\d+)_modC_1", (r"joint_transformer_blocks_\1_norm1_context_linear",)),
    (r"single_layers_(\d+)_attn_w1([qkv])", (r"single_transformer_blocks_\1_attn_to_\2",)),
    (r"single_layers_(\d+)_attn_w1o", (r"single_transformer_blocks_\1_attn_to_out_0",)),
    (r"single_layers_(\d+)_mlp_c_fc([12])", (r"single_transformer_blocks_\1_ff_linear_\2",)),
    (r"single_layers_(\d+)_mlp_c_proj", (r"single_transformer_blocks_\1_ff_out_projection",)),
    (r"single_layers_(\d+)_modCX_1", (r"single_transformer_blocks_\1_norm1_linear",)),
    (r"t_embedder_mlp_0", ("time_step_proj_linear_1",)),
    (r"t_embedder_mlp_2", ("time_step_proj_linear_2",)),
    (r"cond_seq_linear", ("context_embedder",)),
    (r"init_x_linear", ("pos_embed_proj",)),
    (r"modF_1", ("norm_out_linear",)),
    (r"final_linear", ("proj_out",)),
)
"""The authors' names, which ComfyUI and kohya write."""


class AuraFlow(Family):
    """AuraFlow; without pictures to start from, and without ControlNets in diffusers."""

    name = "auraflow"
    title = "AuraFlow"
    short = "AuraFlow"
    order = 75
    licence = "Apache 2.0"
    single_file = False
    pipeline = "AuraFlowPipeline"
    components = ("vae", "transformer", "text_encoder")
    denoisers = (Denoiser("transformer"),)
    text_encoders = ()
    batch_arguments = ("hidden_states", "encoder_hidden_states", "timestep")
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {("encoder_hidden_states",): "embeds"}
    call_names: ClassVar[Mapping[str, str]] = {"embeds": "prompt_embeds", "mask": "prompt_attention_mask"}
    targets = layer_choices(ATTENTION, FEED_FORWARD, OUTSIDE)
    layout = Layout(("text", "image"), patch=2, leading=8)
    predictions = ("flow",)
    prompt_tokens = TOKENS
    signature = Signature(
        adapter=r"joint_transformer_blocks|single_transformer_blocks[._]\d+[._]ff[._]linear_[12]|"
        r"(double|single)_layers[._]\d+[._](attn[._]w[12][qkvo]|mlp[XC]?[._]c_(fc|proj)|mod[XC]+[._]1)",
        checkpoint=r"(^|\.)double_layers\.\d+\.attn\.w[12]q|joint_transformer_blocks\.",
        hints=r"aura.?flow|pony.?v7",
        precedence=5,
    )

    def named(self, file: LoraFile, pipe: Any) -> LoraFile:
        return renamed(file, self.denoiser, NAMES, "norm_out_linear")

    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        embeds, mask, others, other_mask = pipe.encode_prompt(prompt, negative, guided, images)
        return self.encoding({"embeds": embeds, "mask": mask}, {"embeds": others, "mask": other_mask}, guided)

    def condition(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        import torch

        with torch.no_grad():
            embeds = pipe.encode_prompt(list(texts), do_classifier_free_guidance=False)[0]
        return {"embeds": embeds}

    def readers(self, pipe: Any) -> list[Reader]:
        return [Reader("text_encoder", "t5", TOKENS, 1)]

    def encode_tokenized(self, pipe: Any, tokens: Mapping[str, Tokenized]) -> Tensors:
        given = tokens["text_encoder"]
        embeds = states(pipe, "text_encoder", given, masked=True)[0]
        mask = given.mask[..., None].to(embeds)
        return {"embeds": embeds * mask, "mask": mask.expand_as(embeds).flatten(1)}

    @contextmanager
    def alone(self, pipe: Any, joined: Joined, images: int, run: Any) -> Iterator[None]:
        """Each text has the denoiser's register tokens before it; it puts them before the first one itself."""
        import torch

        model = pipe.transformer

        def separated(module: Any, args: Any, output: Tensor) -> Tensor:
            first, *others = torch.split(output, list(joined.texts), 1)
            registers = model.register_tokens.to(output).expand(len(output), -1, -1)
            return torch.cat([first, *(part for text in others for part in (registers, text))], 1)

        handle = model.context_embedder.register_forward_hook(separated)
        try:
            yield
        finally:
            handle.remove()

    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        predicted: Tensor = denoiser(
            noisy, encoder_hidden_states=given["embeds"].to(noisy.dtype), timestep=times.to(noisy.dtype),
            return_dict=False,
        )[0]  # fmt: skip
        return predicted

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        values = {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 64,
        }
        pipe = miniature.make(
            "AuraFlowPipeline",
            tokenizer=miniature.t5_tokenizer(),
            text_encoder=miniature.t5("UMT5"),
            vae=miniature.vae(),
            transformer=miniature.make("AuraFlowTransformer2DModel", **(values | changes)),
            scheduler=miniature.make("FlowMatchEulerDiscreteScheduler", shift=1.73),
        )
        return miniature.quiet(pipe)


FAMILY = AuraFlow()
