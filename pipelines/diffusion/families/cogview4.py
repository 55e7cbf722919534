"""CogView4: blocks over text and image tokens together, the states of a language model (GLM-4) as text, flow matching.

Z.ai 2025 (no paper of its own; https://github.com/zai-org/CogView4). Texts are padded at their beginning to a multiple
of 16 tokens, and nothing hides that padding: texts of different lengths cannot share a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.diffusion.families.base import (
    Denoiser,
    Encoding,
    Family,
    Joined,
    Layout,
    Signature,
    Tensors,
    joined_texts,
    layer_choices,
    spans_in,
)
from pipelines.diffusion.families.renaming import Rule, renamed

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.formats.lora import LoraFile

TOKENS = 1024
"""Tokens of a prompt that diffusers' pipeline reads."""

ATTENTION = r".*\.attn1\.to_(q|k|v|out\.0)"
FEED_FORWARD = r".*\.ff\.net\.(0\.proj|2)"
OUTSIDE = r"(patch_embed.*|time_condition_embed.*|norm_out.*|proj_out)"
"""First and last layers."""


NAMES: tuple[Rule, ...] = (
    (r"(?:transformer_)?layers_(\d+)_attention_query_key_value",
     tuple(rf"transformer_blocks_\1_attn1_to_{one}" for one in "qkv")),
    (r"(?:transformer_)?layers_(\d+)_attention_dense", (r"transformer_blocks_\1_attn1_to_out_0",)),
    (r"(?:transformer_)?layers_(\d+)_mlp_dense_h_to_4h", (r"transformer_blocks_\1_ff_net_0_proj",)),
    (r"(?:transformer_)?layers_(\d+)_mlp_dense_4h_to_h", (r"transformer_blocks_\1_ff_net_2",)),
    (r"mixins_adaln_adaln_modules_(\d+)_1", (r"transformer_blocks_\1_norm1_linear",)),
    (r"mixins_patch_embed_(text_)?proj", (r"patch_embed_\1proj",)),
    (r"time_embed_0", ("time_condition_embed_timestep_embedder_linear_1",)),
    (r"time_embed_2", ("time_condition_embed_timestep_embedder_linear_2",)),
    (r"label_emb_0_0", ("time_condition_embed_condition_embedder_linear_1",)),
    (r"label_emb_0_2", ("time_condition_embed_condition_embedder_linear_2",)),
    (r"mixins_final_layer_adaln_1", ("norm_out_linear",)),
    (r"mixins_final_layer_linear", ("proj_out",)),
)  # fmt: skip
"""The authors' names."""


class CogView4(Family):
    """CogView4-6B."""

    name = "cogview4"
    title = "CogView4"
    short = "CogView4"
    order = 90
    licence = "Apache 2.0"
    single_file = False
    pipeline = "CogView4Pipeline"
    components = ("vae", "transformer", "text_encoder")
    denoisers = (Denoiser("transformer"),)
    text_encoders = ()
    batch_arguments = (
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "original_size",
        "target_size",
        "crop_coords",
    )
    text_arguments: ClassVar[Mapping[tuple[str, ...], str]] = {("encoder_hidden_states",): "embeds"}
    call_names: ClassVar[Mapping[str, str]] = {"embeds": "prompt_embeds"}
    targets = layer_choices(ATTENTION, FEED_FORWARD, OUTSIDE)
    layout = Layout(("text", "image"), patch=2, text_layers=r"text_proj$", twice=r"\.ff$")
    predictions = ("flow",)
    positive_first = True
    prompt_tokens = TOKENS
    signature = Signature(
        adapter=r"\A(?![\s\S]*(attn2|ff_context))[\s\S]*"
        r"^(transformer\.|base_model\.model\.|lora_transformer_)?transformer_blocks[._]\d+[._]attn1[._]|"
        r"layers[._]\d+[._](attention[._](query_key_value|dense)|mlp[._]dense_(h_to_4h|4h_to_h))|mixins[._]adaln[._]",
        checkpoint=r"time_condition_embed\.condition_embedder|mixins\.adaln\.adaln_modules\.",
        hints=r"cogview.?4",
        precedence=1,
    )

    def named(self, file: LoraFile, pipe: Any) -> LoraFile:
        return renamed(file, self.denoiser, NAMES, "norm_out_linear")

    def pixel_step(self, pipe: Any) -> int:
        """At least 16, as diffusers' pipeline demands for every model."""
        return lcm(16, super().pixel_step(pipe))

    def timetable(self, pipe: Any, steps: int, size: tuple[int, int]) -> dict[str, Any]:
        import numpy as np

        config = pipe.scheduler.config
        times = np.linspace(config.num_train_timesteps, 1.0, steps).astype(np.int64).astype(np.float32)
        found: dict[str, Any] = {"timesteps": times, "sigmas": times / config.num_train_timesteps}
        if config.get("use_dynamic_shifting"):
            cell = pipe.vae_scale_factor * self.layout.patch
            tokens = (size[0] // cell) * (size[1] // cell)
            growth = (tokens / config.get("base_image_seq_len", 256)) ** 0.5
            found["mu"] = growth * config.get("max_shift", 0.75) + config.get("base_shift", 0.25)
        return found

    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        embeds, others = pipe.encode_prompt(prompt, negative, guided, images)
        return self.encoding({"embeds": embeds}, {"embeds": others}, guided)

    def condition(self, pipe: Any, texts: Sequence[str]) -> Tensors:
        """Every text as it is encoded alone; shorter ones end in zeros, which the mask marks."""
        import torch

        with torch.no_grad():
            found = [pipe.encode_prompt(text, do_classifier_free_guidance=False)[0][0] for text in texts]
        masks = [torch.ones(len(text), dtype=torch.bool, device=text.device) for text in found]
        pad = torch.nn.utils.rnn.pad_sequence
        return {"embeds": pad(found, batch_first=True), "mask": pad(masks, batch_first=True)}

    def text_spans(self, pipe: Any, text: str) -> list[tuple[int, int]]:
        spans = spans_in(pipe.tokenizer, text, text, TOKENS)
        return [(0, 0)] * (-len(spans) % 16) + spans

    def joined(self, encodings: Sequence[Encoding]) -> Joined:
        import torch

        *halves, texts, own = joined_texts(encodings, lambda half: list(half["embeds"]))
        given = [{"embeds": torch.stack(half)} if half else {} for half in halves]
        return Joined(self.encoding(given[0], given[1], bool(given[1])), texts, own)

    def predict(
        self, pipe: Any, denoiser: Any, noisy: Tensor, times: Tensor, given: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        """Samples with texts of one length share a call of the denoiser."""
        import torch

        embeds, mask = given["embeds"].to(noisy.dtype), given["mask"]
        lengths = [mask.shape[1]] * len(mask) if mask.is_meta else mask.sum(1).tolist()
        factor = self.latent_factor(pipe)
        size = noisy.new_tensor([[noisy.shape[2] * factor, noisy.shape[3] * factor]])
        made: dict[int, Tensor] = {}
        for length in dict.fromkeys(lengths):
            rows = [row for row, own in enumerate(lengths) if own == length]
            sizes = size.expand(len(rows), 2)
            part = denoiser(
                hidden_states=noisy[rows],
                encoder_hidden_states=embeds[rows, :length],
                timestep=times[rows].to(noisy.dtype) * 1000,
                original_size=sizes,
                target_size=sizes,
                crop_coords=torch.zeros_like(sizes),
                return_dict=False,
            )[0]
            made |= dict(zip(rows, part, strict=True))
        return torch.stack([made[row] for row in range(len(lengths))])

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        values = {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "pos_embed_max_size": 32,
            "sample_size": 16,
            "rope_axes_dim": (16, 16),
        }
        tokenizer = miniature.marked_tokenizer("[gMASK]", "<sop>", side="left")
        pipe = miniature.make(
            "CogView4Pipeline",
            tokenizer=tokenizer,
            text_encoder=miniature.language_model("Glm", tokenizer, pad_token_id=tokenizer.pad_token_id),
            vae=miniature.vae(use_quant_conv=False, use_post_quant_conv=False),
            transformer=miniature.make("CogView4Transformer2DModel", **(values | changes)),
            scheduler=miniature.make(
                "FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75,
                base_image_seq_len=256, time_shift_type="linear",
            ),
        )  # fmt: skip
        return miniature.quiet(pipe)


FAMILY = CogView4()
