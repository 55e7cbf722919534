"""Draws pictures during training, always from the same seeds, without affecting the training."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from adapters.files import whole
from pipelines.diffusion.drawing import stills
from pipelines.diffusion.families import family_of
from studio.composition import base_settings
from studio.datasets.buckets import Size
from studio.datasets.seeds import global_seed
from studio.training.schemas.image import TrainImageConfig


@contextmanager
def evaluation(pipe: Any, device: torch.device) -> Iterator[None]:
    """Every part in evaluation mode, on ``device``, the VAE in the denoiser's precision; afterwards as before."""
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    modes = [{name: module.training for name, module in part.named_modules()} for part in parts]
    places = [next(part.parameters()).device for part in parts]
    precision = pipe.vae.dtype
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    for part in parts:
        part.eval().to(device)
    if precision != denoiser.dtype:
        pipe.vae.to(denoiser.dtype)
    try:
        yield
    finally:
        if precision != denoiser.dtype:
            pipe.vae.to(precision)
        for part, mode, place in zip(parts, modes, places, strict=True):
            part.to(place)
            for name, module in part.named_modules():
                module.training = mode.get(name, False)


def draw_samples(
    pipe: Any, prompts: Sequence[str], size: Size, config: TrainImageConfig, device: torch.device
) -> list[Image.Image]:
    """One picture per prompt; picture i uses ``sample_seed + i``. Steps and guidance that are empty are the base's."""
    steps, guidance = base_settings.of_pipeline(config.base, pipe)
    steps = config.sample_steps or steps
    guidance = guidance if config.sample_guidance is None else config.sample_guidance
    pictures = []
    with torch.no_grad(), evaluation(pipe, device), global_seed(config.sample_seed, "samples"):
        for number, prompt in enumerate(prompts):
            made = pipe(
                **_arguments(pipe, prompt, config.sample_negative, guidance),
                num_inference_steps=steps,
                **family_of(pipe).size_arguments(pipe, size[1], size[0]),
                generator=torch.Generator().manual_seed(config.sample_seed + number),
            )
            pictures += stills(made)
    return pictures


def _arguments(pipe: Any, prompt: str, negative: str, scale: float) -> dict[str, Any]:
    """Prompts and guidance as arguments of the pipeline; encoded, if it takes a negative prompt in no other way."""
    family = family_of(pipe)
    if not negative or "negative_prompt" in inspect.signature(type(pipe).__call__).parameters:
        return {"prompt": prompt, **family.guidance_arguments(scale, negative), **family.picture_arguments()}
    encoding = family.encode(pipe, prompt, negative, 1, scale > family.no_guidance)
    return {**encoding.call_arguments(), **family.guidance_arguments(scale), **family.picture_arguments()}


class Pair(NamedTuple):
    """One prompt and seed, drawn without and with the adapter (paths of pictures)."""

    prompt: str
    seed: int
    without: str
    with_: str


def save_samples(pictures: Sequence[Image.Image], folder: Path, name: str) -> list[Path]:
    """Write ``NAME-i.png``."""
    files = []
    for number, picture in enumerate(pictures):
        file = folder / f"{name}-{number}.png"
        with whole(file) as part:
            picture.save(part, format="PNG")
        files.append(file)
    return files


def sample_prompts(config: TrainImageConfig, captions: Sequence[str]) -> list[str]:
    """The configured prompts; if there are none, the data's first caption, unless samples are only for the end."""
    if config.sample_prompts:
        return [prompt.replace("{trigger}", config.trigger) for prompt in config.sample_prompts]
    return list(captions[:1]) if config.sample_every != 0 or config.sample_at_start else []
