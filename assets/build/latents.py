"""Cache latents of composed scenes: ``python -m assets.build.latents --shards 12``.

Each shard holds 4,096 scenes: latents, captions and the scenes themselves (with boxes). Shards are
independent and seeded by their number; those that exist are kept, so the program can be stopped and
run again, and training can start with the first shards while later ones are made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

import assets
from adapters import files
from assets.build import data
from assets.build.common import build_dir, pick_device

SHARD = 4096
COUNTS = {1: (55.0, 40.0, 5.0), 2: (55.0, 40.0, 5.0), 3: (10.0, 20.0, 70.0)}
"""Relative frequencies of scenes with one, two and three subjects, by how many times pictures are as wide as high."""


def vae_folder() -> Path:
    """Return the folder of the autoencoder: the one in the build folder, else the shipped model's.

    Raises ``FileNotFoundError`` when there is neither.
    """
    shipped = Path(assets.__file__).parent / "models" / "tinymoji" / "vae"
    for folder in (build_dir() / "vae" / "final", shipped):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("no autoencoder yet: run `python -m assets.build.vae`")


def load_vae(device: torch.device) -> AutoencoderKL:
    """Return the autoencoder of :func:`vae_folder`, in fp32, for use."""
    return AutoencoderKL.from_pretrained(vae_folder(), torch_dtype=torch.float32).to(device).eval()


def encoder_digest(weights: dict[str, Tensor]) -> str:
    """Return a hash of the weights that latents depend on: encoder and what follows it, not the decoder."""
    whole = hashlib.sha256()
    for name in sorted(n for n in weights if n.startswith(("encoder.", "quant_conv."))):
        whole.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return whole.hexdigest()


def shard_folder(aspect: int = 1) -> Path:
    """Return the folder of the shards made with the present encoder, subjects, styles and sizes.

    Pictures twice or three times as wide as high (``aspect`` 2, 3) have a folder inside it.
    """
    weights = load_file(vae_folder() / "diffusion_pytorch_model.safetensors")
    words = [encoder_digest(weights), *data.BASE_CONCEPTS, *data.BASE_STYLES, str((data.SIZES, data.SPREAD))]
    folder = build_dir() / "latents" / hashlib.sha256("|".join(words).encode()).hexdigest()[:12]
    return folder if aspect == 1 else folder / f"{aspect}x1"


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> Tensor:
    """Return scaled latents ``(B, 4, H/4, W/4)``, fp32, of uint8 ``(B, H, W, 3)`` pictures."""
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return vae.encode(x).latent_dist.mean * vae.config.scaling_factor


def make_shard(number: int, vae: AutoencoderKL, sprites: np.ndarray, device: torch.device, aspect: int = 1) -> None:
    """Draw, render and encode the scenes of one shard and write its two files."""
    folder = shard_folder(aspect)
    rng = np.random.default_rng([16 + aspect, number])
    scenes = [data.sample_scene(rng, COUNTS[aspect], aspect=aspect) for _ in range(SHARD)]
    parts = []
    for start in range(0, SHARD, 64):
        images = np.stack([data.render(scene, sprites) for scene in scenes[start : start + 64]])
        parts.append(encode_images(vae, images, device).half().cpu().numpy())
    lines = [json.dumps(asdict(scene)) for scene in scenes]
    files.write_text(folder / f"{number:04d}.jsonl", "\n".join(lines) + "\n")
    files.write(folder / f"{number:04d}.npy", lambda part: np.save(part, np.concatenate(parts)))


def load_shard(stem: Path) -> tuple[np.ndarray, list[dict[str, object]]]:
    """Return a shard's latents (fp16 ``(SHARD, 4, 16, 16 * aspect)``, memory-mapped) and its scene records."""
    records = [json.loads(line) for line in stem.with_suffix(".jsonl").read_text("utf-8").splitlines()]
    return np.load(stem.with_suffix(".npy"), mmap_mode="r"), records


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the shards that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--wide", type=int, default=3, help="shards of pictures twice as wide as high")
    parser.add_argument("--widest", type=int, default=0, help="shards of pictures three times as wide as high")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    vae, sprites = load_vae(device), data.load_sprites()
    for aspect, count in ((1, options.shards), (2, options.wide), (3, options.widest)):
        for number in range(count):
            if not (shard_folder(aspect) / f"{number:04d}.npy").is_file():
                make_shard(number, vae, sprites, device, aspect)
                print(f"shard {number} of aspect {aspect} written", flush=True)


if __name__ == "__main__":
    main()
