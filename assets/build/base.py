"""Train the base model: ``python -m assets.build.base --until 18:20 --decay-for 25``.

Text encoder and denoiser learn together, in v-prediction, on cached latents (``assets.build.latents``).
A checkpoint (weights, averages, optimizer, step, curve) is written every few minutes and on SIGTERM or
Ctrl-C; the same command goes on from it, on this or another machine. Each step's data and noise are
drawn from (seed, step) alone, so an interrupted run sees what an uninterrupted one would have seen.
The learning rate warms up after every start and falls to zero over the last ``--decay-for`` minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from adapters import files
from assets.build import grounding, text
from assets.build import latents as cache
from assets.build.common import Average, autocast, build_dir, gradient_norm, pick_device, write_json

FOLDER = "base"
"""Where the checkpoints lie in the build folder."""

DROPOUT = 0.1
"""Share of captions replaced by the empty one, for classifier-free guidance."""


def schedule_config() -> dict[str, Any]:
    """Return the noise schedule, as every scheduler of diffusers understands it."""
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "clip_sample": False,
    }


def new_scheduler() -> DDIMScheduler:
    """Return the scheduler that the model ships with."""
    return DDIMScheduler(**schedule_config(), set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing")


def new_unet(width: int = 192) -> UNet2DConditionModel:
    """Return an untrained denoiser of 16x16x4 latents, 15.5 million parameters.

    ``width`` is the text encoder's. Attention stands on all three levels, heads are 32 wide.
    """
    channels = (64, 160, 224)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=width,
        attention_head_dim=tuple(c // 32 for c in channels),
        norm_num_groups=32,
    )


class Model(nn.Module):
    """Text encoder and denoiser, trained as one module."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = text.new_text_encoder(text.tokenizer())
        self.unet = new_unet()

    def use_plain_attention(self) -> None:
        """Compute attention as two matrix products: on CPU half again as fast to train as the fused one."""
        self.unet.set_attn_processor(AttnProcessor())
        self.text_encoder.set_attn_implementation("eager")

    def forward(self, noisy: Tensor, times: Tensor, tokens: Tensor) -> Tensor:
        """Predict v: ``noisy`` (B, 4, 16, 16), ``times`` (B,), ``tokens`` (B, LENGTH) -> like ``noisy``."""
        words = self.text_encoder(tokens).last_hidden_state
        return self.unet(noisy, times, words).sample  # type: ignore[no-any-return]


def learning_rate(peak: float, steps_here: int, warm_steps: int, left: float, decay: float) -> float:
    """Return the rate for the next step.

    ``steps_here`` counts from this start, ``left`` and ``decay`` are seconds: a linear warm-up times a
    cosine that falls to zero while ``left`` runs from ``decay`` to 0.
    """
    warm = min(1.0, (steps_here + 1) / warm_steps)
    end = 1.0 if left >= decay else 0.5 * (1 - math.cos(math.pi * max(left, 0.0) / decay))
    return peak * warm * end


def seconds_until(clock: str) -> float:
    """Return the seconds from now to the next ``HH:MM`` of the local clock."""
    now = datetime.datetime.now()
    hour, minute = map(int, clock.split(":"))
    then = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    if then <= now:
        then += datetime.timedelta(days=1)
    return (then - now).total_seconds()


class Scenes:
    """The cached shards: latents, token ids and number of subjects; looks for new shards when told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: list[Path] = []
        self.arrays: list[np.ndarray] = []
        self.tokens = np.zeros((0, text.LENGTH), np.int64)
        self.counts = np.zeros(0, np.int64)
        self.marks = np.zeros((0, grounding.MOST, text.LENGTH), bool)
        self.boxes = np.zeros((0, grounding.MOST, 4), np.float32)
        self.look()

    def look(self) -> None:
        """Add shards that have appeared. Raises ``FileNotFoundError`` when there are none at all."""
        for found in sorted(self.folder.glob("[0-9]*.npy")):
            if found not in self.known:
                array, records = cache.load_shard(found)
                self.known.append(found)
                self.arrays.append(array)
                captions = [str(record["caption"]) for record in records]
                scenes: list[Any] = [record["subjects"] for record in records]
                names = [[s["concept"] for s in scene] for scene in scenes]
                marks = grounding.subject_tokens(text.tokenizer(), captions, names, text.LENGTH)
                self.tokens = np.concatenate([self.tokens, text.encode(captions)])
                self.counts = np.concatenate([self.counts, np.asarray([len(n) for n in names], np.int64)])
                self.marks = np.concatenate([self.marks, marks])
                self.boxes = np.concatenate([self.boxes, np.stack([grounding.boxes_of(r) for r in records])])
        if not self.known:
            raise FileNotFoundError("no cached latents: run `python -m assets.build.latents`")

    def draw(self, rng: np.random.Generator, size: int, mix: Sequence[float]) -> tuple[Tensor, ...]:
        """Draw ``size`` scenes; ``mix`` are the shares of one, two and three subjects.

        Returns latents fp32 ``(size, 4, 16, 16 * aspect)``, token ids ``(size, LENGTH)``, some emptied, and for
        :func:`grounding.grounding_loss` the tokens of each subject and their boxes.
        """
        share = np.asarray(mix, float)[self.counts - 1] / np.bincount(self.counts, minlength=4)[self.counts]
        picked = np.searchsorted(np.cumsum(share), rng.random(size) * share.sum())
        picked = np.minimum(picked, len(share) - 1)
        values = np.stack([self.arrays[i // cache.SHARD][i % cache.SHARD] for i in picked])
        tokens = self.tokens[picked]
        marks = self.marks[picked]
        emptied = rng.random(size) < DROPOUT
        tokens[emptied], marks[emptied] = text.encode([""])[0], False
        parts = (tokens, marks, self.boxes[picked])
        return torch.from_numpy(values).float(), *map(torch.from_numpy, parts)


def draw_noise(seed: int, step: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return noise of ``shape`` and one time per sample in 0..999, from (seed, step).

    Times are spread over the range, the nearly clean end less often (density as t to the 2/3): little
    can be learned there.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    noise = torch.randn(shape, generator=generator)
    cells = (torch.arange(shape[0]) + torch.rand(shape[0], generator=generator)) / shape[0]
    return noise, (cells**0.6 * 1000).long().clamp(max=999)


def loss_weight(cumulative: Tensor, times: Tensor) -> Tensor:
    """Return the weight of each sample's v loss: 1 where noise prevails, less where the picture is nearly clean.

    With s the signal-to-noise ratio this is min(1, 5 / (s + 1)), which weighs the error of the picture
    itself by min(s + 1, 5). ``cumulative`` are the schedule's cumulative alphas, ``times`` (B,).
    """
    share = cumulative.to(times.device)[times]
    return (5 * (1 - share)).clamp(max=1)


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Split parameters: matrices with weight decay; embeddings, norms and biases without."""
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]


class Run:
    """The state of a training run and its checkpoint file."""

    def __init__(self, folder: Path, device: torch.device, average: float) -> None:
        self.file = folder / "checkpoint.pt"
        self.device = device
        self.model = self.new_model().to(device)
        self.average = Average(self.model, average)
        self.optimizer = self.new_optimizer()
        self.step, self.samples, self.spent = 0, 0, 0.0
        self.curve: list[list[float]] = []
        if self.file.is_file():
            self.load()

    def new_model(self) -> nn.Module:
        """Return the untrained model; its cross-attention keeps what the grounding loss needs."""
        model = Model()
        if self.device.type == "cpu":
            model.use_plain_attention()
        self.recorders = grounding.record(model.unet)
        return model

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of ``self.model``'s parameters."""
        return torch.optim.AdamW(parameter_groups(self.model, 0.01), lr=0.0, betas=(0.9, 0.99), fused=True)

    def start_from(self, folder: Path) -> None:
        """Take the weights and the history of an exported model directory; the optimizer starts anew."""
        load_weights(self.model, folder)
        self.average = Average(self.model, self.average.limit)
        history = folder / "training.json"
        if history.is_file():
            self.curve = json.loads(history.read_text("utf-8"))["rows"]
            self.step, self.samples = self.curve[-1][:2]
            self.spent = 60 * self.curve[-1][2]

    def load(self) -> None:
        """Go on from the checkpoint file."""
        state = torch.load(self.file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.samples, self.spent = state["step"], state["samples"], state["spent"]
        self.curve = state["curve"]

    def save(self) -> None:
        """Write the checkpoint, and the curve as JSON beside it."""
        state = {
            "model": self.model.state_dict(), "average": self.average.state(), "optimizer": self.optimizer.state_dict(),
            "step": self.step, "samples": self.samples, "spent": self.spent, "curve": self.curve,
        }  # fmt: skip
        files.write(self.file, lambda part: torch.save(state, part))
        write_json(
            self.file.with_name("curve.json"),
            {"columns": ["step", "samples", "minutes", "loss", "lr"], "rows": self.curve},
        )

    def keep(self) -> Path:
        """Write the averaged weights in fp16 as ``average-STEP.pt``, for learning curves."""
        values = {name: value.half() for name, value in self.average.values.items()}
        target = self.file.with_name(f"average-{self.step:06d}.pt")
        return files.write(
            target, lambda part: torch.save({"values": values, "step": self.step, "samples": self.samples}, part)
        )


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put the weights of an exported model directory into ``model``, in fp32."""
    parts = {"text_encoder": "model.safetensors", "unet": "diffusion_pytorch_model.safetensors"}
    for name, file in parts.items():
        weights = load_file(folder / name / file)
        getattr(model, name).load_state_dict({key: value.float() for key, value in weights.items()})


def load_average(model: Model, file: Path) -> dict[str, Any]:
    """Put averaged weights into ``model``, from a checkpoint or an ``average-*.pt`` file; return its facts."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    values = state["average"]["values"] if "average" in state else state["values"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name].to(parameter))
    return {"step": state["step"], "samples": state["samples"]}


def make_pipeline(model: Model) -> StableDiffusionPipeline:
    """Join the model with the finished autoencoder and the tokenizer into an ordinary pipeline."""
    return StableDiffusionPipeline(
        vae=cache.load_vae(torch.device("cpu")),
        text_encoder=model.text_encoder.eval(),
        tokenizer=text.tokenizer(),
        unet=model.unet.eval(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def data_facts() -> dict[str, Any]:
    """Return what the card says of the data besides the curve: nothing."""
    return {}


def latest(folder: Path | None = None) -> Path:
    """Return the checkpoint file. Raises ``FileNotFoundError`` when training has not begun."""
    file = (folder or build_dir() / "base") / "checkpoint.pt"
    if not file.is_file():
        raise FileNotFoundError("no checkpoint yet: run `python -m assets.build.base`")
    return file


def train_step(
    run: Run, kinds: dict[int, Scenes], sigmas: DDPMScheduler, options: argparse.Namespace, rate: float
) -> tuple[float, float]:
    """Make one optimizer step and return the two losses: denoising and grounding.

    ``kinds`` are the scenes by aspect; a batch of wide ones is smaller by as much.
    """
    rng = np.random.default_rng([options.seed, run.step])
    aspect = min(kinds)
    if len(kinds) > 1 and rng.random() < options.wide:
        aspect = max(kinds)
    clean, tokens, marks, boxes = kinds[aspect].draw(rng, options.batch // aspect, options.mix)
    noise, times = draw_noise(options.seed, run.step, tuple(clean.shape))
    clean, tokens, marks, boxes, noise, times = (t.to(run.device) for t in (clean, tokens, marks, boxes, noise, times))
    noisy = sigmas.add_noise(clean, noise, times)
    wanted = sigmas.get_velocity(clean, noise, times)
    with autocast(run.device, options.dtype):
        made = run.model(noisy, times, tokens)
    error = functional.mse_loss(made.float(), wanted, reduction="none").mean((1, 2, 3))
    loss = (error * loss_weight(sigmas.alphas_cumprod, times)).mean()
    seen = [recorder.seen for recorder in run.recorders if recorder.seen is not None]
    placed = grounding.grounding_loss(seen, marks, boxes, aspect)
    (loss + options.grounding * placed).backward()
    gradient_norm(list(run.model.parameters()), 1.0)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.average.update(run.model)
    run.step += 1
    run.samples += len(clean)
    return float(loss.detach()), float(placed.detach())


def loop(
    run: Run, step: Callable[[float], tuple[float, float]], look: Callable[[], None], options: argparse.Namespace
) -> None:
    """Train until the time is over or a signal comes; save at the end.

    ``step`` makes one step at the given learning rate and returns its two losses; ``look`` is called now and then, to
    take in new data.
    """
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _frame: stop.append(got))
    total = seconds_until(options.until) if options.until else options.minutes * 60
    began = last = saved = kept = time.monotonic()
    losses: list[tuple[float, float]] = []
    here, first = 0, run.samples
    while not stop and (left := began + total - time.monotonic()) > 0 and run.step < options.max_steps:
        rate = learning_rate(options.lr, here, options.warm_steps, left, options.decay_for * 60)
        losses.append(step(rate))
        here += 1
        now = time.monotonic()
        run.spent += now - last
        last = now
        if run.step % options.log_every == 0:
            mean, placed = (sum(column) / len(losses) for column in zip(*losses, strict=True))
            losses.clear()
            run.curve.append([run.step, run.samples, round(run.spent / 60, 2), round(mean, 5), rate])
            speed = (run.samples - first) / (now - began)
            state = f"step {run.step} samples {run.samples} loss {mean:.4f} grounding {placed:.4f} lr {rate:.2e}"
            print(f"{state} {speed:.1f}/s {left / 60:.0f} min left", flush=True)
            look()
        if now - saved > options.save_every:
            run.save()
            saved = now
        if now - kept > options.keep_every:
            run.keep()
            kept = now
    run.save()
    run.keep()
    print(f"stopped at step {run.step}, {run.samples} samples, {run.spent / 60:.1f} min", flush=True)


def train(run: Run, kinds: dict[int, Scenes], options: argparse.Namespace) -> None:
    """Train on the scenes, by aspect, as :func:`loop` does."""
    sigmas = DDPMScheduler(**schedule_config())

    def look() -> None:
        for scenes in kinds.values():
            scenes.look()

    loop(run, lambda rate: train_step(run, kinds, sigmas, options, rate), look, options)


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the command line of a training run."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--until", help="local clock time HH:MM at which to stop (else --minutes)")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument(
        "--decay-for", type=float, default=20.0, help="minutes over which the rate falls to 0 at the end"
    )
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--warm-steps", type=int, default=100)
    parser.add_argument("--average", type=float, default=0.998)
    parser.add_argument("--mix", type=json.loads, default=[0.55, 0.4, 0.05], help="shares of 1, 2, 3 subjects, JSON")
    parser.add_argument("--wide", type=float, default=0.2, help="share of batches with pictures twice as wide as high")
    parser.add_argument(
        "--grounding", type=float, default=0.1, help="weight of the attention loss (assets.build.grounding)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds between checkpoints")
    parser.add_argument("--keep-every", type=float, default=900.0, help="seconds between kept averages")
    parser.add_argument("--folder", type=Path, default=None)
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--start-from", type=Path, help="model directory to begin with when there is no checkpoint")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, resuming from the checkpoint if there is one."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    folder = options.folder or build_dir() / FOLDER
    run = Run(folder, pick_device(options.device), options.average)
    if options.start_from and run.step == 0:
        run.start_from(options.start_from)
    size = sum(p.numel() for p in run.model.parameters()) / 1e6
    print(f"{size:.2f} M parameters, from step {run.step}", flush=True)
    train(run, {aspect: Scenes(cache.shard_folder(aspect)) for aspect in ((1, 2) if options.wide else (1,))}, options)


if __name__ == "__main__":
    main()
