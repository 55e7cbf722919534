"""A base for training: a loaded diffusers pipeline, the description of its family, its noise process.

What differs between families is in :mod:`pipelines.diffusion.families`; this class binds it to one pipeline.
Conditioning is a dictionary of tensors with the batch in front: the family's embeddings, "time_ids" for families that
take the size, "guidance" for UNets with an embedded guidance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipelines.diffusion import families
from pipelines.diffusion.families.configuration import check_trainable
from studio.datasets.buckets import Placement, Size
from studio.training.objective import Diffusion, FlowMatching, Process

Tensors = dict[str, torch.Tensor]


class Family:
    """One base; it uses the parts of ``pipe`` and never replaces them.

    Attributes:
        about: the family's description.
        process: noise levels, noisy latents and targets.
        guidance: value for denoisers that take the guidance as an input (Flux).
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.about = families.family_of(pipe)
        check_trainable(pipe, self.about)
        config = pipe.scheduler.config
        self.process: Process = (
            FlowMatching(config, self.about.training_shift) if self.about.flow else Diffusion(config)
        )
        self.guidance = 1.0

    @property
    def name(self) -> str:
        return self.about.name

    @property
    def denoiser_name(self) -> str:
        return self.about.denoiser

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.denoiser_name)

    @property
    def text_encoder_names(self) -> tuple[str, ...]:
        """Encoders that may learn (they take ``tokens``); others only ever encode."""
        return self.about.learning_encoders

    @property
    def text_encoders(self) -> dict[str, Any]:
        return {name: getattr(self.pipe, name) for name in self.text_encoder_names}

    @property
    def encoder_parts(self) -> dict[str, torch.nn.Module]:
        """Every text encoder, learning or not."""
        parts = self.pipe.components.items()
        return {n: p for n, p in parts if n.startswith("text_encoder") and isinstance(p, torch.nn.Module)}

    # ------------------------------------------------------------------ sizes
    @property
    def resolution(self) -> int:
        """Pixels the base model was made for."""
        return self.about.resolution(self.pipe)

    @property
    def multiple(self) -> int:
        """Sides of a picture should be multiples of this."""
        return self.about.multiple(self.pipe)

    @property
    def smallest_multiple(self) -> int:
        """Sides of a picture must be multiples of this."""
        return self.latent_factor * self.about.layout.patch

    @property
    def latent_factor(self) -> int:
        """Pixels per side of a latent cell."""
        return self.about.latent_factor(self.pipe)

    # ------------------------------------------------------------------ pictures
    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mean and deviation of latents ``(batch, 2, channels, h, w)`` of pictures ``(batch, 3, H, W)`` in [-1, 1]."""
        with torch.no_grad():
            return self.about.moments(self.pipe, pixels).float()

    def latents(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Scaled latents ``(batch, channels, h, w)`` drawn from ``moments (batch, 2, channels, h, w)``."""
        return self.about.scaled(self.pipe, moments[:, 0] + moments[:, 1] * noise)

    # ------------------------------------------------------------------ prompts
    def tokens(self, texts: Sequence[str]) -> Tensors:
        """Integer inputs of the text encoders that may learn."""
        return self.about.tokens(self.pipe, texts)

    def cut_short(self, texts: Sequence[str]) -> list[str]:
        """The prompts that are longer than the first text encoder reads."""
        return [text for text in texts if self.about.too_long(self.pipe, text)]

    def encode(self, tokens: Mapping[str, torch.Tensor], encoders: Mapping[str, Any]) -> Tensors:
        """Conditioning from ``tokens``; gradients flow into ``encoders``."""
        return self.about.encode_tokens(self.pipe, tokens, encoders)

    def condition(self, texts: Sequence[str]) -> Tensors:
        """Conditioning of prompts by the pipeline's own encoders (no gradients)."""
        return self.about.condition(self.pipe, texts)

    def null_condition(self, text: str = "") -> Tensors:
        """Conditioning (batch 1) that the family's pipeline uses for "no prompt" in guidance."""
        return self.about.null_condition(self.pipe, text)

    def size_condition(self, original: Size, placement: Placement) -> Tensors:
        """Conditioning on one picture's size and crop, without batch, if the denoiser takes it (SDXL)."""
        if not self.about.size_input:
            return {}
        numbers = [*reversed(original), placement.top, placement.left, *reversed(placement.size)]
        return {"time_ids": torch.tensor(numbers, dtype=torch.float32)}

    # ------------------------------------------------------------------ denoiser
    def predict(self, denoiser: Any, noisy: torch.Tensor, times: torch.Tensor, given: Tensors) -> torch.Tensor:
        """The denoiser's prediction, shaped like ``noisy``."""
        return self.about.predict(self.pipe, denoiser, noisy, times, given, self.guidance)


def family_of(pipe: Any) -> Family:
    """``pipe`` wrapped for training.

    Raises:
        InputError: a pipeline of no known family.
    """
    return Family(pipe)
