"""Train the autoencoder of the base model: ``python -m assets.build.vae --minutes 22``.

An ``AutoencoderKL`` (f=4, 4 latent channels) learns on random crops of composed pictures in the base
styles. The art is every icon the three base sets share, without the held-out subjects, so that the
latent space covers more than the base model's own concepts. Colours are varied at random.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional

from assets.build import data
from assets.build.common import Average, autocast, build_dir, pick_device, write_atomic, write_json

CROP = 32


def new_vae() -> AutoencoderKL:
    """Return an untrained autoencoder: f=4, four latent channels, about 1.5 million parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=data.SIZE,
        scaling_factor=1.0,
    )


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return horizontal and vertical differences of ``(B, C, H, W)``."""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def loss_terms(made: Tensor, wanted: Tensor, kl: Tensor) -> Tensor:
    """Return the scalar loss: L1 + 0.5 edge L1 + squared error + 1e-4 KL per latent value.

    ``made`` and ``wanted`` are ``(B, 3, H, W)`` in -1..1.
    """
    l1 = functional.l1_loss(made, wanted)
    edge = sum(functional.l1_loss(a, b) for a, b in zip(edges(made), edges(wanted), strict=True))
    return l1 + 0.5 * edge + functional.mse_loss(made, wanted) + 1e-4 * kl.mean()


def vary_colours(image: np.ndarray, rng: Generator) -> np.ndarray:
    """Turn the hue and scale the saturation of a uint8 RGB picture at random."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(np.float32)
    hsv[..., 0] = (hsv[..., 0] + rng.uniform(0, 180)) % 180
    hsv[..., 1] = np.clip(hsv[..., 1] * rng.uniform(0.4, 1.2), 0, 255)
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)


def random_crop(sprites: np.ndarray, rng: Generator) -> np.ndarray:
    """Draw a crop, uint8 ``(CROP, CROP, 3)``, of a picture with one to three sprites.

    ``sprites`` is uint8 ``(N, S, S, 4)``. Crops lie on the drawing mostly; sizes are those of scenes.
    """
    number = int(rng.choice(3, p=(0.55, 0.4, 0.05)))
    placed = data.place(rng, ["x"] * (number + 1))
    canvas = np.empty((data.SIZE, data.SIZE, 3), np.float32)
    names = list(data.BACKGROUNDS)
    name = "white" if rng.random() < 0.4 else names[int(rng.integers(len(names)))]
    canvas[:] = data.BACKGROUNDS[name]
    for subject in placed:
        data.paste(canvas, sprites[int(rng.integers(len(sprites)))], subject.x, subject.y, subject.size)
    image = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    if rng.random() < 0.2:
        image = vary_colours(image, rng)
    top, left = rng.integers(0, data.SIZE - CROP + 1, 2)
    image = image[top : top + CROP, left : left + CROP]
    return image[:, ::-1] if rng.random() < 0.5 else image


def batch_of(sprites: np.ndarray, rng: Generator, size: int, device: torch.device) -> Tensor:
    """Return ``size`` crops as a float tensor ``(size, 3, CROP, CROP)`` in -1..1."""
    crops = np.stack([random_crop(sprites, rng) for _ in range(size)])
    return torch.from_numpy(crops).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def general_sprites() -> np.ndarray:
    """Return uint8 ``(N, S, S, 4)``: all icons common to the base sets, in the three base styles."""
    modules = data.fetch_packages(build_dir())
    names = data.common_icons(modules, list(data.BASE_STYLES.values()))
    stack = data.load_sprites(data.BASE_STYLES, {name: name for name in names})
    return stack.reshape(-1, *stack.shape[2:])


def learning_rate(done: float, peak: float) -> float:
    """Return the rate at the fraction ``done`` (0..1): short warm-up, then a cosine to zero."""
    warm = min(1.0, done / 0.02 + 0.02)
    return peak * warm * 0.5 * (1 + float(np.cos(np.pi * min(done, 1.0))))


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> tuple[np.ndarray, float]:
    """Pass uint8 ``(B, H, W, 3)`` through the autoencoder; return the result and the MSE in -1..1."""
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    error = float(functional.mse_loss(y, x))
    return ((y + 1) * 127.5 + 0.5).byte().permute(0, 2, 3, 1).cpu().numpy(), error


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> None:
    """Change the two 1x1 convolutions so that latents have mean 0 and deviation 1 in each channel.

    The reconstruction stays the same and ``scaling_factor`` becomes 1: what Stable Diffusion's format
    cannot say (a shift per channel) is put into the weights. ``images`` is uint8 ``(B, H, W, 3)``.
    """
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = vae.encode(x).latent_dist.sample().float()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:channels] /= std.view(-1, 1, 1, 1)
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()
    after.bias += after.weight[..., 0, 0] @ mean
    after.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train for a fixed time (resumable), save the averaged model and a picture of reconstructions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=22.0, help="whole training time, resumed runs included")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds between checkpoints")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = pick_device(options.device)
    root = build_dir() / "vae"
    sprites = general_sprites()
    vae = new_vae().to(device)
    average = Average(vae, 0.998)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=1e-3, foreach=True)
    step, spent, curve = 0, 0.0, []
    checkpoint = root / "checkpoint.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load(state["average"])
        step, spent, curve = state["step"], state["spent"], state["curve"]
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters, {len(sprites)} sprites, step {step}")

    def save() -> None:
        state = {
            "model": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state(),
            "step": step, "spent": spent, "curve": curve,
        }  # fmt: skip
        write_atomic(checkpoint, lambda part: torch.save(state, part))

    running, saved, began_at = 0.0, spent, step
    limit = options.minutes * 60
    while spent < limit:
        began = time.monotonic()
        rng = np.random.default_rng([options.seed, step])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spent / limit, options.lr)
        x = batch_of(sprites, rng, options.batch, device)
        with autocast(device, options.dtype):
            posterior = vae.encode(x).latent_dist
            made = vae.decode(posterior.sample()).sample
        kl = posterior.kl().float() / posterior.mean[0].numel()
        loss = loss_terms(made.float(), x, kl)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(vae)
        running += float(loss.detach())
        step += 1
        spent += time.monotonic() - began
        if step % 100 == 0:
            curve.append((step, running / 100))
            print(
                f"step {step} loss {running / 100:.4f} {spent / 60:.1f} min {step * options.batch / spent:.0f}/s",
                flush=True,
            )
            running = 0.0
        if spent - saved > options.save_every:
            save()
            saved = spent
    if step > began_at:
        save()
    finish(
        vae,
        average,
        root,
        device,
        {"steps": step, "crops": step * options.batch, "minutes": spent / 60, "curve": curve},
    )


def finish(vae: AutoencoderKL, average: Average, root: Path, device: torch.device, facts: dict[str, object]) -> None:
    """Normalise and measure the averaged model on fresh scenes; save it as ``root/final``."""
    average.copy_to(vae)
    vae.eval()
    rng = np.random.default_rng(999)
    sprites = data.load_sprites()
    sheets = {}
    for name, styles in {"base": tuple(data.BASE_STYLES), "held-out": tuple(data.HELD_STYLES)}.items():
        scenes = [data.sample_scene(rng, (55, 40, 5), styles) for _ in range(256)]
        sheets[name] = np.stack([data.render(scene, sprites) for scene in scenes])
    normalise_latents(vae, sheets["base"], device)
    for name, images in sheets.items():
        made, facts[f"mse {name} styles"] = reconstruction(vae, images, device)
        pairs = [im for a, b in zip(images[:48], made[:48], strict=True) for im in (a, b)]
        data.save_png(root / f"reconstruction-{name}.png", data.contact_sheet(pairs, 12))
    vae.save_pretrained(root / "final", safe_serialization=True)
    write_json(root / "facts.json", facts)
    print({k: v for k, v in facts.items() if k != "curve"})


if __name__ == "__main__":
    main()
