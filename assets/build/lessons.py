"""Let tinymoji teach: ``python -m assets.build.lessons --passes 4`` writes what it sees in noisy scenes.

A lesson is a cached shard once more (``assets.build.latents``), each scene with noise of some strength and
the *flow velocity* x - e that tinymoji finds in it, conditional on the caption (or, for some, on the empty
one). Against the data's own target x - e it has no noise: the teacher gives the mean over all clean
pictures that fit. Where the teacher was never asked (nearly pure noise) the data's own target stands.
Shards and passes are seeded by their numbers; those that exist are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

import assets
from adapters import files
from assets.build import base, text
from assets.build import latents as cache
from assets.build.common import pick_device


def teacher_sigmas() -> Tensor:
    """Return the flow noise level of each of the teacher's 1,000 times, rising: fp32 ``(1000,)``.

    The teacher sees a x + b e with a² + b² = 1, a flow model (1 - s) x + s e: the same picture but for its scale
    where s / (1 - s) = b / a.
    """
    config = base.schedule_config()
    roots = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, config["num_train_timesteps"])
    share = torch.cumprod(1 - roots.double() ** 2, 0)
    ratio = ((1 - share) / share).sqrt()
    return (ratio / (1 + ratio)).float()


def flow_from_v(noisy: Tensor, v: Tensor, sigmas: Tensor) -> Tensor:
    """Turn the teacher's v into the velocity x - e.

    ``noisy`` is the flow picture (1 - s) x + s e, ``(B, ...)``; ``v`` the teacher's answer for it rescaled by
    :func:`teacher_scale`; ``sigmas`` ``(B,)``.
    """
    s = sigmas.view(-1, *[1] * (noisy.ndim - 1))
    scale = teacher_scale(s)
    a, b, x = (1 - s) * scale, s * scale, noisy * scale
    return (a * x - b * v) - (b * x + a * v)


def teacher_scale(sigmas: Tensor) -> Tensor:
    """Return what a flow picture is multiplied with to become the teacher's: 1 / sqrt((1 - s)² + s²)."""
    return ((1 - sigmas) ** 2 + sigmas**2).rsqrt()


def draw_sigmas(generator: torch.Generator, count: int) -> Tensor:
    """Draw noise levels in (0, 1): logit-normal around 0.57, a tenth of them uniform."""
    normal = torch.sigmoid(0.3 + torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.1, uniform, normal).clamp(0.002, 0.998)


class Teacher:
    """tinymoji's text encoder and denoiser, half precision, for answers only."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self.words = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.bfloat16).to(device)
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.bfloat16).to(device)
        if device.type == "cpu":
            self.unet.set_attn_processor(base.AttnProcessor())
        self.sigmas = teacher_sigmas()

    @torch.no_grad()
    def velocity(self, noisy: Tensor, sigmas: Tensor, tokens: Tensor) -> Tensor:
        """Return x - e for flow pictures ``(B, 4, H, W)`` at levels ``(B,)``, ``tokens`` ``(B, 40)``."""
        at = torch.searchsorted(self.sigmas, sigmas).clamp(1, 999)
        low, high = self.sigmas[at - 1], self.sigmas[at]
        times = at - 1 + ((sigmas - low) / (high - low)).clamp(0, 1)
        scaled = noisy * teacher_scale(sigmas).view(-1, 1, 1, 1)
        words = self.words(tokens.to(self.device)).last_hidden_state
        v = self.unet(scaled.to(self.device, torch.bfloat16), times.to(self.device), words).sample
        return flow_from_v(noisy, v.float().cpu(), sigmas)


def lesson_folder(aspect: int = 1) -> Path:
    """Return the folder of lessons on the shards of :func:`assets.build.latents.shard_folder`."""
    return cache.shard_folder(aspect) / "lessons"


def give_lesson(teacher: Teacher, shard: Path, number: int, target: Path, batch: int = 64) -> None:
    """Write one pass over a shard: noisy pictures and targets fp16, sigmas fp32, and which captions were emptied."""
    clean, records = cache.load_shard(shard)
    generator = torch.Generator().manual_seed(1_000_003 * (number + 1) + 31 * int(shard.stem) + clean.shape[-1])
    count = len(clean)
    sigmas = draw_sigmas(generator, count)
    emptied = torch.rand(count, generator=generator) < base.DROPOUT
    captions = ["" if gone else str(record["caption"]) for gone, record in zip(emptied, records, strict=True)]
    tokens = torch.from_numpy(text.encode(captions))
    noisy_parts, target_parts = [], []
    for start in range(0, count, batch):
        rows = slice(start, start + batch)
        x = torch.from_numpy(clean[rows].astype(np.float32))
        e = torch.randn(x.shape, generator=generator)
        s = sigmas[rows]
        noisy = (1 - s.view(-1, 1, 1, 1)) * x + s.view(-1, 1, 1, 1) * e
        told = teacher.velocity(noisy, s, tokens[rows])
        asked = (s <= teacher.sigmas[-1]) & (s >= teacher.sigmas[0])
        noisy_parts.append(noisy.half().numpy())
        target_parts.append(torch.where(asked.view(-1, 1, 1, 1), told, x - e).half().numpy())
    stack = np.stack([np.concatenate(noisy_parts), np.concatenate(target_parts)], 1)
    facts = np.stack([sigmas.numpy(), emptied.numpy().astype(np.float32)], 1)
    files.write(target.with_suffix(".facts.npy"), lambda part: np.save(part, facts))
    files.write(target, lambda part: np.save(part, stack))


def main(arguments: Sequence[str] | None = None) -> None:
    """Give the lessons that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=4, help="lessons on each shard, each with fresh noise")
    parser.add_argument("--teacher", type=Path, default=Path(assets.__file__).parent / "models" / "tinymoji")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    teacher = Teacher(options.teacher, pick_device(options.device))
    for number in range(options.passes):
        for aspect in (1, 2):
            for shard in sorted(cache.shard_folder(aspect).glob("[0-9]*.npy")):
                target = lesson_folder(aspect) / f"{number:02d}-{shard.stem}.npy"
                if not target.is_file():
                    give_lesson(teacher, shard, number, target)
                    print(f"lesson {target.name} of aspect {aspect} written", flush=True)


if __name__ == "__main__":
    main()
