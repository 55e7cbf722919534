"""The diffusion bed: a tiny Stable Diffusion that has learned circles and squares, and pictures of crosses.

32-pixel pictures, 16 x 16 latents. The VAE is random but nearly deterministic and scaled to unit variance; the UNet
learns shapes in a few seconds, so that an adapter has something to adapt.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from PIL import Image, ImageDraw

from studio.training.families import family_of
from tests import tiny

WORDS = ("circle", "square", "cross", "red", "green", "blue", "yellow")
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (240, 220, 60)}


def shape(kind: str, colour: str, rng: random.Random) -> Image.Image:
    """A 32 x 32 picture of one shape."""
    picture = Image.new("RGB", (32, 32), (30, 30, 60) if kind == "cross" else (235, 235, 225))
    pen = ImageDraw.Draw(picture)
    size, x, y = rng.randint(10, 18), rng.randint(2, 11), rng.randint(2, 11)
    box, ink = (x, y, x + size, y + size), COLOURS[colour]
    if kind == "circle":
        pen.ellipse(box, fill=ink)
    elif kind == "square":
        pen.rectangle(box, fill=ink)
    else:
        third = size // 3
        pen.rectangle((x + third, y, x + 2 * third, y + size), fill=ink)
        pen.rectangle((x, y + third, x + size, y + 2 * third), fill=ink)
    return picture


def pipeline(steps: int = 400, seed: int = 0):
    """The bed's base model, its UNet trained for ``steps`` on circles and squares."""
    pipe = tiny.sd(seed)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    pipe.tokenizer = tiny.clip_tokenizer(WORDS)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    with torch.no_grad():
        pipe.vae.quant_conv.weight[4:] = 0
        pipe.vae.quant_conv.bias[4:] = -12
    family, rng = family_of(pipe), random.Random(seed)
    kinds = [(kind, colour) for kind in ("circle", "square") for colour in ("red", "green", "blue")]
    pictures = [(f"a {c} {k}", shape(k, c, rng)) for k, c in kinds * 16]
    pixels = torch.stack([_pixels(picture) for _, picture in pictures])
    means = family.moments(pixels)[:, 0]
    pipe.vae.register_to_config(scaling_factor=1 / float(means.std()))
    latents = means * pipe.vae.config.scaling_factor
    words = family.condition([text for text, _ in pictures])["embeds"]
    generator = torch.Generator().manual_seed(seed)
    pipe.unet.train()
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=4e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(pictures), (8,), generator=generator)
        noise = torch.randn(latents[chosen].shape, generator=generator)
        times = family.process.times(torch.rand(8, generator=generator))
        noisy = family.process.noisy(latents[chosen], noise, times)
        predicted = family.predict(pipe.unet, noisy, times, {"embeds": words[chosen]})
        loss = (predicted - family.process.target(latents[chosen], noise, times)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    pipe.unet.eval()
    return pipe


def crosses(folder: Path, count: int = 8, captions: bool = True, seed: int = 7) -> Path:
    """A folder of yellow crosses on dark blue: a shape, colour and background the base has never seen."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for number in range(count):
        shape("cross", "yellow", rng).save(folder / f"{number}.png")
        if captions:
            (folder / f"{number}.txt").write_text("a yellow cross")
    return folder


def _pixels(picture: Image.Image) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(32, 32, 3).permute(2, 0, 1).float() / 127.5 - 1
