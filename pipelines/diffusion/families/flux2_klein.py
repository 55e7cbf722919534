"""Flux.2 [klein]: the small Flux.2, with Qwen3 as its text encoder and guidance by a second pass.

Black Forest Labs 2026 (no paper; https://github.com/black-forest-labs/flux2). The distilled models need four steps and
no guidance; those called "base" are guided.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pipelines.diffusion.families.base import Encoding, Signature, spans_in
from pipelines.diffusion.families.flux2 import FAMILY as DEV
from pipelines.diffusion.families.flux2 import Flux2, tiny_parts


class Flux2Klein(Flux2):
    """Flux.2 [klein], 4B and 9B, distilled or base."""

    name = "flux2-klein"
    title = "Flux.2 klein"
    short = "Flux.2 klein"
    order = 44
    licence = "4B: Apache 2.0; 9B: FLUX Non-Commercial License"
    pipeline = "Flux2KleinPipeline"
    other_pipelines: ClassVar[Mapping[str, str]] = {
        "edit": "Flux2KleinPipeline",
        "inpaint": "Flux2KleinInpaintPipeline",
    }
    guidance_input: ClassVar[bool] = False
    usual_steps = 50
    signature: ClassVar[Signature] = Signature(
        adapter=DEV.signature.adapter,
        checkpoint=r"(?s)\A(?!.*guidance_(in|embedder)\.)(?=.*double_stream_modulation_img)",
        widths=(3072, 4096),
        hints=r"klein",
        precedence=7,
    )

    def usual_of(self, name: str, config: Mapping[str, Any]) -> tuple[int, float]:
        return (4, 1.0) if config.get("is_distilled") else super().usual_of(name, config)

    def takes_guidance(self, pipe: Any) -> bool:
        return not pipe.config.is_distilled

    def encode(self, pipe: Any, prompt: str, negative: str | None, images: int, guided: bool) -> Encoding:
        texts = (prompt, negative or "") if guided else (prompt,)
        made = [{"embeds": pipe.encode_prompt(text, num_images_per_prompt=images)[0]} for text in texts]
        return self.encoding(made[0], made[-1], guided)

    def too_long(self, pipe: Any, text: str) -> bool:
        return len(pipe.tokenizer(_written(pipe, text), verbose=False).input_ids) > self._most(pipe)

    def text_spans(self, pipe: Any, text: str) -> list[tuple[int, int]]:
        most = self._most(pipe)
        spans = spans_in(pipe.tokenizer, _written(pipe, text), text, most)
        return [(0, 0)] * (most - len(spans) if pipe.tokenizer.padding_side == "left" else 0) + spans

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        import torch

        from pipelines.diffusion.families import miniature

        torch.manual_seed(seed)
        pipe = miniature.make(
            "Flux2KleinPipeline",
            **tiny_parts({"guidance_embeds": False, **changes}),
            text_encoder=miniature.chat_model(27),
            tokenizer=miniature.qwen_tokenizer(),
        )
        return miniature.quiet(pipe)


def _written(pipe: Any, text: str) -> str:
    """A prompt in the chat template."""
    messages = [{"role": "user", "content": text}]
    more = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    written: str = pipe.tokenizer.apply_chat_template(messages, **more)
    return written


FAMILY = Flux2Klein()
