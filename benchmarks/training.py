"""Time and peak memory of one training step, ours against diffusers' own example script.

The reference restates the loop of diffusers 0.42's ``examples/text_to_image/train_text_to_image_lora.py``: pictures go
through the VAE and captions through the text encoder in every step, noise and timesteps are drawn with torch's
generator, one AdamW over the LoRA parameters, accelerate around it. Ours is measured as it runs by default (encoded
pictures and captions are kept) and with both caches off. Same base, pictures, batch, rank, precision, optimiser.

    python -m benchmarks.training --rounds 15            # prints and writes benchmarks/results/training.{json,md}

Steps of the three alternate within one process and medians are compared, so that a busy machine slows all alike; peak
memory is measured in a separate process per variant.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from adapters.progress import Silent
from benchmarks.measures import peak_memory
from studio import library
from studio.training.device import make_accelerator
from studio.training.drivers.accelerate import Loop
from studio.training.schemas.image import TrainImageConfig
from studio.training.session import TrainSession
from studio.training.tasks.image import ImageTask

VARIANTS = ("diffusers", "ours", "ours-live")
TITLES = {
    "diffusers": "diffusers' example script",
    "ours": "ours (default: caches in memory)",
    "ours-live": "ours, both caches off",
}
RESULTS = Path(__file__).parent / "results"


def pictures(folder: Path, side: int, count: int = 16) -> Path:
    """A captioned folder of random pictures."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        pixels = torch.randint(0, 256, (side // 8, side // 8, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((side, side)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a flat icon of thing {number}")
    return folder


def config_for(base: str, data: Path, batch: int, rank: int, side: int, live: bool) -> TrainImageConfig:
    """The configuration both programs run."""
    return TrainImageConfig.parse(
        {
            "base": base,
            "data": str(data),
            "mode": "captioned",
            "device": "cpu",
            "resolution": side,
            "rank": rank,
            "batch_size": batch,
            "lr_schedule": "constant",
            "steps": 10_000,
            "cache_latents": "none" if live else "memory",
            "cache_text": "none" if live else "memory",
        }
    )


def our_step(config: TrainImageConfig, folder: Path) -> Callable[[], Any]:
    """One optimiser step of the studio's trainer."""
    session = TrainSession.of(ImageTask(config), folder, Silent())
    session.accelerator = make_accelerator(config, torch.float32, "cpu", folder)
    loop = Loop(session)
    loop.prepare()
    batches = loop.batches()

    def step() -> None:
        loop.optimiser_step(batches)
        session.step += 1

    return step


def reference_step(config: TrainImageConfig, folder: Path) -> Callable[[], Any]:
    """One optimiser step as ``train_text_to_image_lora.py`` takes it."""
    import torch.nn.functional as F
    from diffusers import DDPMScheduler, DiffusionPipeline
    from diffusers.optimization import get_scheduler
    from peft import LoraConfig

    accelerator = make_accelerator(config, torch.float32, "cpu", folder)
    pipe = DiffusionPipeline.from_pretrained(library.resolve_base(config.base), torch_dtype=torch.float32)
    unet, vae, text_encoder, tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(
            r=config.rank,
            lora_alpha=config.rank,
            init_lora_weights="gaussian",
            target_modules=["to_k", "to_q", "to_v", "to_out.0"],
        )
    )
    lora_layers = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(lora_layers, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    loader = torch.utils.data.DataLoader(
        _Examples(Path(config.data), tokenizer, config.resolution or 64), shuffle=True, batch_size=config.batch_size
    )
    lr_scheduler = get_scheduler("constant", optimizer=optimizer)
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(unet, optimizer, loader, lr_scheduler)
    unet.train()

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    batches = endless()

    def step() -> None:
        batch = next(batches)
        with accelerator.accumulate(unet):
            latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (latents.shape[0],)).long()
            noisy = noise_scheduler.add_noise(latents, noise, timesteps)
            words = text_encoder(batch["input_ids"], return_dict=False)[0]
            if noise_scheduler.config.prediction_type == "epsilon":
                target = noise
            else:
                target = noise_scheduler.get_velocity(latents, noise, timesteps)
            prediction = unet(noisy, timesteps, words, return_dict=False)[0]
            loss = F.mse_loss(prediction.float(), target.float(), reduction="mean")
            accelerator.gather(loss.repeat(config.batch_size)).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(lora_layers, 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()

    return step


class _Examples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The script's preprocessing: read, resize, centre crop, normalise, tokenise."""

    def __init__(self, folder: Path, tokenizer: Any, side: int) -> None:
        self.files, self.tokenizer, self.side = sorted(folder.glob("*.png")), tokenizer, side

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        import numpy as np
        from PIL import Image

        file = self.files[number]
        picture = Image.open(file).convert("RGB").resize((self.side, self.side), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
        words = self.tokenizer(
            file.with_suffix(".txt").read_text(),
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        return {"pixel_values": pixels, "input_ids": words.input_ids[0]}


def make_step(variant: str, options: argparse.Namespace, folder: Path) -> Callable[[], Any]:
    """The step of a variant on ``options``' base, batch, rank and side."""
    data = pictures(folder / "pictures", options.side)
    config = config_for(options.base, data, options.batch, options.rank, options.side, live=variant == "ours-live")
    return reference_step(config, folder) if variant == "diffusers" else our_step(config, folder / variant)


def measure_times(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of CPU time per step, interleaved over the variants; warm-up steps are dropped."""
    steps = {variant: make_step(variant, options, folder) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(options.rounds + 2):
        for variant, step in steps.items():
            began = time.process_time()
            step()
            if number >= 2:
                times[variant].append(time.process_time() - began)
    return times


def measure_memory(variant: str, options: argparse.Namespace) -> int:
    """Peak resident bytes of a process that trains three steps."""
    command = [sys.executable, "-m", "benchmarks.training", "--only", variant]
    for name in ("base", "batch", "rank", "side"):
        command += [f"--{name}", str(getattr(options, name))]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(printed.strip().splitlines()[-1])


def report(times: dict[str, list[float]], memory: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """Medians, their ratios to the reference, and where this was measured."""
    medians = {variant: statistics.median(values) for variant, values in times.items()}
    rows = {
        variant: {
            "seconds_per_step": round(medians[variant], 4),
            "time_ratio": round(medians[variant] / medians["diffusers"], 3),
            "peak_bytes": memory[variant],
            "memory_ratio": round(memory[variant] / memory["diffusers"], 3),
        }
        for variant in VARIANTS
    }
    return {
        "what": "CPU seconds of one optimiser step (interleaved medians) and peak resident memory of the process",
        "base": options.base,
        "batch": options.batch,
        "rank": options.rank,
        "side": options.side,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "load": round(os.getloadavg()[0], 1),
        "variants": rows,
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        "# One training step against diffusers' example script",
        "",
        f"Base {result['base']}, {result['side']} px, batch {result['batch']}, rank {result['rank']}, fp32, "
        f"{result['threads']} thread, torch {result['torch']}; median of {result['rounds']} interleaved steps "
        f"(CPU time; machine load {result['load']}). Peak memory is the whole process's.",
        "",
        "| | s / step | against diffusers | peak memory | against diffusers |",
        "|---|---|---|---|---|",
    ]
    for variant, row in result["variants"].items():
        lines.append(
            f"| {TITLES[variant]} | {row['seconds_per_step']:.3f} | {row['time_ratio']:.2f}x "
            f"| {row['peak_bytes'] / 2**20:.0f} MiB | {row['memory_ratio']:.2f}x |"
        )
    return "\n".join([*lines, "", "Made by `python -m benchmarks.training`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tinymoji")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=VARIANTS, help="train three steps of one variant, print its peak memory")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.only:
            step = make_step(options.only, options, Path(folder))
            for _ in range(3):
                step()
            print(peak_memory())
            return
        times = measure_times(options, Path(folder))
    memory = {variant: measure_memory(variant, options) for variant in VARIANTS}
    result = report(times, memory, options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "training.md").write_text(as_markdown(result))
    print(as_markdown(result))


if __name__ == "__main__":
    main()
