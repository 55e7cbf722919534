"""What differs between model families, and nothing else.

A family knows which part of the pipeline is the denoiser, which text encoders can learn, how words become
conditioning, how pictures become latents and how the denoiser is called. The loop knows none of that.

Conditioning is a dictionary of tensors with the batch in front; ``tokens`` are its integer inputs, ``guidance`` is the
embedded guidance of UNets that take one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from adapters.errors import InputError
from studio.datasets.buckets import Placement, Size
from studio.training.objective import Diffusion, FlowMatching, Process

Tensors = dict[str, torch.Tensor]


class Family:
    """Base of the families; wraps a diffusers pipeline whose parts it uses and never replaces."""

    name: ClassVar[str] = ""
    denoiser_name: ClassVar[str] = "unet"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Encoders that may learn (they take ``tokens``); others only ever encode."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.process = self._process()

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.denoiser_name)

    @property
    def text_encoders(self) -> dict[str, Any]:
        return {name: getattr(self.pipe, name) for name in self.text_encoder_names}

    # ------------------------------------------------------------------ sizes
    @property
    def resolution(self) -> int:
        """Pixels the base model was made for."""
        size = self.pipe.unet.config.sample_size
        return int(size if isinstance(size, int) else size[0]) * self._latent_factor

    @property
    def multiple(self) -> int:
        """Sides of a picture must be multiples of this: the VAE's factor times the UNet's."""
        levels: int = len(self.pipe.unet.config.block_out_channels)
        return self._latent_factor << (levels - 1)

    @property
    def smallest_multiple(self) -> int:
        """No picture side can be anything but a multiple of this."""
        return self._latent_factor

    @property
    def encoder_parts(self) -> dict[str, torch.nn.Module]:
        """Every text encoder, learning or not."""
        parts = self.pipe.components.items()
        return {n: p for n, p in parts if n.startswith("text_encoder") and isinstance(p, torch.nn.Module)}

    @property
    def _latent_factor(self) -> int:
        levels: int = len(self.pipe.vae.config.block_out_channels)
        return 1 << (levels - 1)

    # ------------------------------------------------------------------ pictures
    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mean and deviation of latents ``(batch, 2, channels, h, w)`` of pictures ``(batch, 3, H, W)`` in [-1, 1]."""
        vae = self.pipe.vae
        with torch.no_grad():
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1).float()

    def latents(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Scaled latents ``(batch, channels, h, w)`` drawn from ``moments (batch, 2, channels, h, w)``."""
        config = self.pipe.vae.config
        drawn = moments[:, 0] + moments[:, 1] * noise
        shift: float = getattr(config, "shift_factor", None) or 0.0
        scale: float = config.scaling_factor
        return (drawn - shift) * scale

    # ------------------------------------------------------------------ words
    def tokens(self, texts: Sequence[str]) -> Tensors:
        """Integer inputs of the text encoders that may learn."""
        return {name: _token_ids(self._tokenizer(name), texts) for name in self.text_encoder_names}

    def cut_short(self, texts: Sequence[str]) -> list[str]:
        """The prompts that are longer than the first text encoder reads."""
        tokenizer = self.pipe.tokenizer
        limit = tokenizer.model_max_length
        return [text for text in texts if len(tokenizer(text, verbose=False).input_ids) > limit]

    def _tokenizer(self, encoder: str) -> Any:
        return getattr(self.pipe, encoder.replace("text_encoder", "tokenizer"))

    def encode(self, tokens: Mapping[str, torch.Tensor], encoders: Mapping[str, Any]) -> Tensors:
        """Conditioning from ``tokens``; gradients flow into ``encoders``."""
        raise NotImplementedError

    def condition(self, texts: Sequence[str]) -> Tensors:
        """Conditioning of prompts by the pipeline's own encoders (no gradients)."""
        device = next(iter(self.text_encoders.values())).device
        with torch.no_grad():
            return self.encode({k: v.to(device) for k, v in self.tokens(texts).items()}, self.text_encoders)

    def null_condition(self, text: str = "") -> Tensors:
        """Conditioning (batch 1) that the family's pipeline uses for "no prompt" in guidance."""
        return self.condition([text])

    def size_condition(self, original: Size, placement: Placement) -> Tensors:
        """Conditioning of one picture's size and cut, without batch (SDXL)."""
        return {}

    # ------------------------------------------------------------------ denoiser
    def predict(self, denoiser: Any, noisy: torch.Tensor, times: torch.Tensor, given: Tensors) -> torch.Tensor:
        """The denoiser's prediction, shaped like ``noisy``."""
        raise NotImplementedError

    def _process(self) -> Process:
        return Diffusion(self.pipe.scheduler.config)


class StableDiffusion(Family):
    """SD 1.x and 2.x: one CLIP encoder, epsilon or v prediction."""

    name = "sd"

    def encode(self, tokens: Mapping[str, torch.Tensor], encoders: Mapping[str, Any]) -> Tensors:
        return {"words": encoders["text_encoder"](tokens["text_encoder"])[0]}

    def predict(self, denoiser: Any, noisy: torch.Tensor, times: torch.Tensor, given: Tensors) -> torch.Tensor:
        words = given["words"].to(noisy.dtype)
        predicted: torch.Tensor = denoiser(
            noisy, times, encoder_hidden_states=words, timestep_cond=given.get("guidance"), return_dict=False
        )[0]
        return predicted


class StableDiffusionXL(Family):
    """SDXL: two CLIP encoders (their last but one layer, side by side), pooled words, sizes as conditioning."""

    name = "sdxl"
    text_encoder_names = ("text_encoder", "text_encoder_2")

    def encode(self, tokens: Mapping[str, torch.Tensor], encoders: Mapping[str, Any]) -> Tensors:
        outputs = {n: encoders[n](tokens[n], output_hidden_states=True) for n in self.text_encoder_names}
        words = torch.cat([outputs[name].hidden_states[-2] for name in self.text_encoder_names], dim=-1)
        return {"words": words, "pooled": outputs["text_encoder_2"][0]}

    def null_condition(self, text: str = "") -> Tensors:
        given = self.condition([text])
        if not text and self.pipe.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(value) for name, value in given.items()}
        return given

    def size_condition(self, original: Size, placement: Placement) -> Tensors:
        numbers = [*reversed(original), placement.top, placement.left, *reversed(placement.size)]
        return {"time_ids": torch.tensor(numbers, dtype=torch.float32)}

    def predict(self, denoiser: Any, noisy: torch.Tensor, times: torch.Tensor, given: Tensors) -> torch.Tensor:
        added = {"text_embeds": given["pooled"].to(noisy.dtype), "time_ids": given["time_ids"].to(noisy.dtype)}
        words = given["words"].to(noisy.dtype)
        predicted: torch.Tensor = denoiser(
            noisy,
            times,
            encoder_hidden_states=words,
            timestep_cond=given.get("guidance"),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return predicted


class _FlowTransformer(Family):
    """What SD3 and Flux share: a transformer, flow matching, encoders that do not learn here."""

    denoiser_name = "transformer"
    text_encoder_names = ()

    def tokens(self, texts: Sequence[str]) -> Tensors:
        raise InputError(f"Text encoder LoRAs of {self.name} are not trained: set train_text_encoder to false.")

    def _process(self) -> Process:
        return FlowMatching(self.pipe.scheduler.config)

    @property
    def multiple(self) -> int:
        return self._latent_factor * 2

    @property
    def smallest_multiple(self) -> int:
        return self._latent_factor * 2


class StableDiffusion3(_FlowTransformer):
    """SD 3.x: two CLIP encoders and T5, joint attention."""

    name = "sd3"

    @property
    def resolution(self) -> int:
        return int(self.pipe.transformer.config.sample_size) * self._latent_factor

    def condition(self, texts: Sequence[str]) -> Tensors:
        prompts = list(texts)
        with torch.no_grad():
            words, _, pooled, _ = self.pipe.encode_prompt(
                prompts,
                prompts,
                prompts,
                do_classifier_free_guidance=False,
                max_sequence_length=_words_limit(self.pipe.tokenizer_3, 256),
            )
        return {"words": words, "pooled": pooled}

    def predict(self, denoiser: Any, noisy: torch.Tensor, times: torch.Tensor, given: Tensors) -> torch.Tensor:
        predicted: torch.Tensor = denoiser(
            hidden_states=noisy,
            timestep=times.to(noisy.dtype) * 1000,
            encoder_hidden_states=given["words"].to(noisy.dtype),
            pooled_projections=given["pooled"].to(noisy.dtype),
            return_dict=False,
        )[0]
        return predicted


class Flux(_FlowTransformer):
    """Flux.1: CLIP pooled words and T5, latents packed two by two, guidance as an input."""

    name = "flux"
    guidance = 1.0

    @property
    def resolution(self) -> int:
        return int(self.pipe.default_sample_size) * self._latent_factor

    def condition(self, texts: Sequence[str]) -> Tensors:
        with torch.no_grad():
            words, pooled, _ = self.pipe.encode_prompt(
                list(texts), list(texts), max_sequence_length=_words_limit(self.pipe.tokenizer_2, 512)
            )
        return {"words": words, "pooled": pooled}

    def predict(self, denoiser: Any, noisy: torch.Tensor, times: torch.Tensor, given: Tensors) -> torch.Tensor:
        batch, channels, height, width = noisy.shape
        packed = self.pipe._pack_latents(noisy, batch, channels, height, width)
        picture_ids = self.pipe._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype)
        text_ids = torch.zeros(given["words"].shape[1], 3, device=noisy.device, dtype=noisy.dtype)
        guided = self.pipe.transformer.config.guidance_embeds
        predicted = denoiser(
            hidden_states=packed,
            timestep=times.to(noisy.dtype),
            guidance=torch.full((batch,), self.guidance, device=noisy.device) if guided else None,
            pooled_projections=given["pooled"].to(noisy.dtype),
            encoder_hidden_states=given["words"].to(noisy.dtype),
            txt_ids=text_ids,
            img_ids=picture_ids,
            return_dict=False,
        )[0]
        return _unpack(predicted, height, width)


FAMILIES: dict[str, type[Family]] = {f.name: f for f in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)}


def family_of(pipe: Any) -> Family:
    """The family of a loaded diffusers pipeline.

    Raises:
        InputError: none of ours.
    """
    kind = type(pipe).__name__
    names = {
        "StableDiffusionPipeline": "sd",
        "StableDiffusionXLPipeline": "sdxl",
        "StableDiffusion3Pipeline": "sd3",
        "FluxPipeline": "flux",
    }
    if kind not in names:
        raise InputError(f"A {kind} cannot be trained; known are {', '.join(names)}.")
    return FAMILIES[names[kind]](pipe)


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    ids: torch.Tensor = tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


def _words_limit(tokenizer: Any, usual: int) -> int:
    """Tokens of T5: what the pipeline uses, or fewer where the tokenizer has fewer (it may be left out)."""
    return min(usual, tokenizer.model_max_length) if tokenizer is not None else usual


def _unpack(packed: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """``(batch, h/2 * w/2, 4 c)`` -> ``(batch, c, h, w)``: inverse of Flux' packing."""
    batch, _, depth = packed.shape
    grid = packed.view(batch, height // 2, width // 2, depth // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, depth // 4, height, width)
