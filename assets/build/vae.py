"""Train the autoencoder of the base model: ``python -m assets.build.vae``, then again with ``--decoder``.

An ``AutoencoderKL`` (f=4, 4 latent channels) learns on random crops of composed pictures in the base
styles. The art is every icon the three base sets share, without the held-out subjects, so that the
latent space covers more than the base model's own concepts. Colours are varied at random. ``--decoder``
then goes on with the decoder alone, on whole pictures: latents cached before stay valid.
"""

from __future__ import annotations

import argparse
import json
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

from adapters import files
from assets.build import data
from assets.build.common import Average, autocast, build_dir, pick_device, write_json

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
        shift_factor=0.0,
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


def random_crop(sprites: np.ndarray, rng: Generator, side: int = CROP) -> np.ndarray:
    """Draw a crop, uint8 ``(side, side, 3)``, of a picture with one to three sprites.

    ``sprites`` is uint8 ``(N, S, S, 4)``; sizes are those of scenes.
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
    top, left = rng.integers(0, data.SIZE - side + 1, 2)
    image = image[top : top + side, left : left + side]
    return image[:, ::-1] if rng.random() < 0.5 else image


def batch_of(sprites: np.ndarray, rng: Generator, size: int, device: torch.device, side: int = CROP) -> Tensor:
    """Return ``size`` crops as a float tensor ``(size, 3, side, side)`` in -1..1."""
    crops = np.stack([random_crop(sprites, rng, side) for _ in range(size)])
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


class Training:
    """An autoencoder in training, and its checkpoint file.

    With ``decoder_only`` the encoder stays as it is, so latents made with it stay valid.
    """

    def __init__(self, vae: AutoencoderKL, file: Path, decoder_only: bool) -> None:
        self.vae, self.file, self.decoder_only = vae, file, decoder_only
        for module in (vae.encoder, vae.quant_conv):
            module.requires_grad_(not decoder_only)
        self.learnt = [p for p in vae.parameters() if p.requires_grad]
        self.average = Average(vae, 0.998)
        self.optimizer = torch.optim.AdamW(self.learnt, lr=0.0, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
        self.step, self.seen = 0, 0
        self.curve: list[list[float]] = []
        if file.is_file():
            self.load()

    def load(self) -> None:
        """Go on from the checkpoint file."""
        state = torch.load(self.file, map_location=self.vae.device, weights_only=True)
        self.vae.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load(state["average"])
        self.step, self.seen, self.curve = state["step"], state["seen"], state["curve"]

    def save(self) -> None:
        """Write the checkpoint file."""
        state = {
            "model": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state(),
            "step": self.step,
            "seen": self.seen,
            "curve": self.curve,
        }
        files.write(self.file, lambda part: torch.save(state, part))

    def reconstruct(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the decoded pictures and the KL term per sample and latent value.

        The decoder alone learns from latents with a little noise, as a denoiser's are, without KL.
        """
        if self.decoder_only:
            with torch.no_grad():
                latent = self.vae.encode(x).latent_dist.mean.float()
            noise = torch.randn(latent.shape, generator=generator).to(latent) * 0.05
            return self.vae.decode(latent + noise).sample, torch.zeros(1, device=x.device)
        posterior = self.vae.encode(x).latent_dist
        made = self.vae.decode(posterior.sample(generator)).sample
        return made, posterior.kl().float() / posterior.mean[0].numel()

    def update(self, x: Tensor, rate: float, dtype: str, seed: int) -> float:
        """Make one optimizer step on pictures (B, 3, H, W) in -1..1 and return the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with autocast(x.device, dtype):
            made, kl = self.reconstruct(x, torch.Generator().manual_seed(seed))
        loss = loss_terms(made.float(), x, kl)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learnt, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.vae)
        self.step += 1
        self.seen += len(x)
        return float(loss.detach())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decoder", action="store_true", help="improve the decoder of the finished autoencoder only")
    parser.add_argument("--steps", type=int, default=2600, help="whole training, resumed runs included")
    parser.add_argument("--batch", type=int, default=None, help="pictures a step (32 crops; 8 whole with --decoder)")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds between checkpoints")
    return parser.parse_args(arguments)


def train(run: Training, sprites: np.ndarray, options: argparse.Namespace) -> None:
    """Train up to ``options.steps`` steps, on crops, or on whole pictures for the decoder alone."""
    side = data.SIZE if run.decoder_only else CROP
    size = options.batch or (8 if run.decoder_only else 32)
    saved = time.monotonic()
    losses: list[float] = []
    while run.step < options.steps:
        rng = np.random.default_rng([options.seed, int(run.decoder_only), run.step])
        x = batch_of(sprites, rng, size, run.vae.device, side)
        rate = learning_rate(run.step / options.steps, options.lr)
        losses.append(run.update(x, rate, options.dtype, options.seed * 1_000_003 + run.step))
        if run.step % 100 == 0:
            run.curve.append([run.step, sum(losses) / len(losses)])
            print(f"step {run.step} loss {run.curve[-1][1]:.4f}", flush=True)
            losses.clear()
        if time.monotonic() - saved > options.save_every:
            run.save()
            saved = time.monotonic()
    run.save()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train (resumable), save the averaged model and pictures of reconstructions."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device, root = pick_device(options.device), build_dir() / "vae"
    vae = AutoencoderKL.from_pretrained(root / "final") if options.decoder else new_vae()
    name = "decoder-checkpoint.pt" if options.decoder else "checkpoint.pt"
    run = Training(vae.to(device), root / name, options.decoder)
    sprites = general_sprites()
    print(f"{sum(p.numel() for p in run.learnt) / 1e6:.2f} M parameters, {len(sprites)} sprites, step {run.step}")
    train(run, sprites, options)
    facts = json.loads((root / "facts.json").read_text("utf-8")) if options.decoder else {}
    finish(run, root, facts)


def finish(run: Training, root: Path, facts: dict[str, object]) -> None:
    """Normalise and measure the averaged model on fresh scenes; save it as ``root/final``, update ``facts``."""
    device, vae = run.vae.device, run.vae
    run.average.copy_to(vae)
    vae.eval()
    rng = np.random.default_rng(999)
    sprites = data.load_sprites()
    sheets = {}
    for name, styles in {"base": tuple(data.BASE_STYLES), "held-out": tuple(data.HELD_STYLES)}.items():
        scenes = [data.sample_scene(rng, (55, 40, 5), styles) for _ in range(256)]
        sheets[name] = np.stack([data.render(scene, sprites) for scene in scenes])
    if not run.decoder_only:
        normalise_latents(vae, sheets["base"], device)
    for name, images in sheets.items():
        made, facts[f"mse {name} styles"] = reconstruction(vae, images, device)
        pairs = [im for a, b in zip(images[:48], made[:48], strict=True) for im in (a, b)]
        data.save_png(root / f"reconstruction-{name}.png", data.contact_sheet(pairs, 12))
    vae.save_pretrained(root / "final", safe_serialization=True)
    facts["decoder pictures" if run.decoder_only else "crops"] = run.seen
    facts["decoder curve" if run.decoder_only else "curve"] = run.curve
    write_json(root / "facts.json", facts)
    print({k: v for k, v in facts.items() if "curve" not in k})


if __name__ == "__main__":
    main()
