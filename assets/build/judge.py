"""The judge: a small network that names the subject and the style of a picture.

``python -m assets.build.judge`` trains it on renders of the art alone, never on pictures
made by a model, tests it on renders drawn with other seeds, and writes ``assets/models/judge``.
Others use :func:`load_judge`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.random import Generator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import assets
from adapters import files
from assets.build import data
from assets.build.common import Average, autocast, build_dir, pick_device, write_json

INPUT = 64
EXTRA_SETS = ("noto-v1", "fxemoji", "emojione")
"""Icon sets that serve as further views of the subjects while training; they have no style word."""


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut; halves the picture when ``stride`` is 2."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, after)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, after)
        self.short = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, before, H, W) to (B, after, H / stride, W / stride)."""
        y = functional.silu(self.norm1(self.first(x)))
        return functional.silu(self.norm2(self.second(y)) + self.short(x))


class Network(nn.Module):
    """Pictures (B, 3, 64, 64) in 0..1 -> subject logits (B, subjects) and style logits (B, styles)."""

    def __init__(self, subjects: int, styles: int, widths: Sequence[int] = (32, 64, 112, 176)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 5, 2, 2)
        pairs = zip([widths[0], *widths[:-1]], widths, strict=True)
        self.blocks = nn.Sequential(*(Block(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(pairs)))
        self.subject = nn.Linear(2 * widths[-1], subjects)
        self.style = nn.Linear(2 * widths[-1], styles)

    def features(self, x: Tensor) -> Tensor:
        """Return pooled features (B, 2 * last width): mean and maximum over places."""
        y = self.blocks(functional.silu(self.stem(x * 2 - 1)))
        return torch.cat([y.mean((2, 3)), y.amax((2, 3))], 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return subject and style logits."""
        y = self.features(x)
        return self.subject(y), self.style(y)


def letterbox(images: Tensor, size: int = INPUT) -> Tensor:
    """Scale (B, 3, H, W) so that the longer side is ``size`` and fill to a square with the edge pixels."""
    height, width = images.shape[-2:]
    factor = size / max(height, width)
    new = (max(1, round(height * factor)), max(1, round(width * factor)))
    if new != (height, width):
        images = functional.interpolate(images, new, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    return functional.pad(images, (left, size - new[1] - left, top, size - new[0] - top), mode="replicate")


class Judge:
    """A trained network with its labels.

    ``labels`` are the subjects' names, ``styles`` the style words, in the order of the outputs.
    """

    def __init__(self, network: Network, labels: Sequence[str], styles: Sequence[str]) -> None:
        self.network = network.eval()
        self.labels = list(labels)
        self.styles = list(styles)

    def index(self, name: str) -> int:
        """Return the output number of a subject. Raises ``KeyError`` for one the judge does not know."""
        if name not in self.labels:
            raise KeyError(f"the judge does not know {name!r}")
        return self.labels.index(name)

    @torch.no_grad()
    def _logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"pictures must be (B, 3, H, W), got {tuple(images.shape)}")
        weight = self.network.stem.weight
        made: tuple[Tensor, Tensor] = self.network(letterbox(images.to(weight).clamp(0, 1)))
        return made

    def classify(self, images: Tensor) -> Tensor:
        """Return subject probabilities (B, subjects) of pictures (B, 3, H, W), float in 0..1."""
        return self._logits(images)[0].softmax(-1)

    def classify_style(self, images: Tensor) -> Tensor:
        """Return style probabilities (B, styles) of pictures (B, 3, H, W), float in 0..1."""
        return self._logits(images)[1].softmax(-1)

    def classify_region(self, images: Tensor, box: tuple[float, float, float, float]) -> Tensor:
        """Return subject probabilities of one region.

        ``box`` is (left, top, right, bottom) in fractions of the picture. Raises ``ValueError`` when
        it is empty or leaves the picture.
        """
        left, top, right, bottom = box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"a box is 0 <= left < right <= 1 and 0 <= top < bottom <= 1, got {box}")
        height, width = images.shape[-2:]
        rows = slice(round(top * height), max(round(bottom * height), round(top * height) + 1))
        columns = slice(round(left * width), max(round(right * width), round(left * width) + 1))
        return self.classify(images[..., rows, columns])


def load_judge(folder: Path | None = None, device: str = "cpu") -> Judge:
    """Load the shipped judge, or one saved in ``folder``. Raises ``FileNotFoundError`` when absent."""
    folder = folder or assets.path("models/judge")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    network = Network(len(config["labels"]), len(config["styles"]), config["widths"])
    weights = load_file(folder / "model.safetensors")
    network.load_state_dict({name: value.float() for name, value in weights.items()})
    return Judge(network.to(device), config["labels"], config["styles"])


# ---------------------------------------------------------------- training pictures


class Views:
    """All sprites of the subjects: uint8 (N, S, S, 4) with subject and style numbers (-1: no style word)."""

    def __init__(self, sprites: np.ndarray, subjects: np.ndarray, styles: np.ndarray) -> None:
        self.sprites, self.subjects, self.styles = sprites, subjects, styles

    def only(self, keep: np.ndarray) -> Views:
        """Return the views selected by a boolean mask."""
        return Views(self.sprites[keep], self.subjects[keep], self.styles[keep])


def load_views(extra: bool) -> Views:
    """Return the views of all subjects in the five styles, and in the extra sets that have them."""
    main = data.load_sprites()
    styles, subjects = np.meshgrid(np.arange(main.shape[0]), np.arange(main.shape[1]), indexing="ij")
    parts = [Views(main.reshape(-1, *main.shape[2:]), subjects.ravel(), styles.ravel())]
    modules = data.fetch_packages(build_dir())
    for name in EXTRA_SETS if extra else ():
        icons = data.load_icons(modules, name)
        has = {w: i for w, i in data.CONCEPTS.items() if i in icons["icons"] or i in icons.get("aliases", {})}
        numbers = np.asarray([list(data.CONCEPTS).index(w) for w in has])
        parts.append(Views(data.load_sprites({"": name}, has)[0], numbers, np.full(len(numbers), -1)))
    return Views(*(np.concatenate([getattr(p, key) for p in parts]) for key in ("sprites", "subjects", "styles")))


def held_cells(views: Views, every: int = 30) -> np.ndarray:
    """Return the mask of (subject, style) cells kept out of training: one in ``every`` of the five styles."""
    cell = views.subjects * len(data.STYLES) + views.styles
    return (views.styles >= 0) & (np.random.default_rng(77).permutation(cell.max() + 1)[cell] % every == 0)


def draw_view(views: Views, index: int, rng: Generator) -> np.ndarray:
    """Draw one view on a plain background, uint8 (64, 64, 3): random place, size, colours, blur, noise.

    Sometimes a neighbour looks in from a side, and sometimes the picture is a narrow strip filled up
    to a square, as regions of larger pictures are.
    """
    canvas = np.empty((INPUT, INPUT, 3), np.float32)
    monochrome = views.styles[index] == list(data.STYLES).index("monochrome")
    canvas[:] = draw_background(rng, light=monochrome)
    size = float(rng.uniform(0.34, 0.98))
    slack = (1 - size) / 2 + 0.04
    strip = size < 0.5 and rng.random() < 0.6
    slack_x = min(slack, max(0.02, (0.5 - size) / 2)) if strip else slack
    x, y = 0.5 + rng.uniform(-slack_x, slack_x), 0.5 + rng.uniform(-slack, slack)
    if rng.random() < 0.25:
        other = views.sprites[int(rng.integers(len(views.sprites)))]
        away = (0.25 if strip else 0.5) + rng.uniform(0.33, 0.45) * size
        data.paste(canvas, other, 0.5 + away * (1 if rng.random() < 0.5 else -1), y, size * rng.uniform(0.8, 1.1))
    data.paste(canvas, turn(views.sprites[index], rng), x, y, size)
    if strip:
        quarter = INPUT // 4
        canvas[:, :quarter] = canvas[:, quarter : quarter + 1]
        canvas[:, -quarter:] = canvas[:, -quarter - 1 : -quarter]
    return degrade(canvas, rng)


def draw_background(rng: Generator, light: bool) -> np.ndarray:
    """Return a background colour (3,): one of the named ones, or any; never dark when ``light``."""
    if rng.random() < 0.8:
        names = list(data.BACKGROUNDS)[: -1 if light else None]
        name = "white" if rng.random() < 0.45 else names[int(rng.integers(len(names)))]
        return np.asarray(data.BACKGROUNDS[name], np.float32) + rng.normal(0, 4, 3).astype(np.float32)
    return rng.uniform(170 if light else 0, 255, 3).astype(np.float32)


def turn(sprite: np.ndarray, rng: Generator) -> np.ndarray:
    """Turn a sprite by up to 12 degrees and stretch it by up to 12 %, half of the time."""
    if rng.random() < 0.5:
        return sprite
    side = sprite.shape[0]
    matrix = cv2.getRotationMatrix2D((side / 2, side / 2), rng.uniform(-12, 12), rng.uniform(0.88, 1.0))
    matrix[0] *= rng.uniform(0.88, 1.06)
    return cv2.warpAffine(sprite, matrix, (side, side), flags=cv2.INTER_LINEAR)


def degrade(canvas: np.ndarray, rng: Generator) -> np.ndarray:
    """Blur, lose resolution, shift colours and add noise at random; return uint8."""
    if rng.random() < 0.5:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 1.6))
    if rng.random() < 0.3:
        small = int(rng.integers(24, 56))
        canvas = cv2.resize(cv2.resize(canvas, (small, small), interpolation=cv2.INTER_AREA), (INPUT, INPUT))
    if rng.random() < 0.5:
        canvas = (canvas - 128) * rng.uniform(0.75, 1.15) + 128 + rng.normal(0, 10, 3)
    if rng.random() < 0.5:
        canvas = canvas + rng.normal(0, rng.uniform(1, 12), canvas.shape)
        if rng.random() < 0.5:
            canvas = canvas + cv2.resize(rng.normal(0, 20, (8, 8, 3)), (INPUT, INPUT), interpolation=cv2.INTER_CUBIC)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def draw_batch(views: Views, rng: Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return pictures (size, 3, 64, 64) in 0..1, subject numbers and style numbers (-1: none)."""
    picked = rng.integers(0, len(views.sprites), size)
    images = np.stack([draw_view(views, int(i), rng) for i in picked])
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return x, torch.from_numpy(views.subjects[picked]), torch.from_numpy(views.styles[picked])


# ---------------------------------------------------------------- training, test, card


@torch.no_grad()
def accuracy(network: Network, views: Views, seed: int, rounds: int) -> tuple[float, float, int]:
    """Test on ``rounds`` fresh pictures of every view: subject accuracy, style accuracy, pictures."""
    rng = np.random.default_rng(seed)
    right = style_right = style_all = count = 0
    order = np.tile(np.arange(len(views.sprites)), rounds)
    for start in range(0, len(order), 256):
        picked = order[start : start + 256]
        images = np.stack([draw_view(views, int(i), rng) for i in picked])
        subject, style = network(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        right += int((subject.argmax(1).numpy() == views.subjects[picked]).sum())
        known = views.styles[picked] >= 0
        style_right += int((style.argmax(1).numpy() == views.styles[picked])[known].sum())
        style_all += int(known.sum())
        count += len(picked)
    return right / count, style_right / max(style_all, 1), count


def train(network: Network, views: Views, options: argparse.Namespace) -> tuple[Average, dict[str, Any]]:
    """Train for ``options.steps`` steps; return the averaged weights and facts about the run."""
    device = pick_device(options.device)
    network.to(device).train()
    average = Average(network, 0.998)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=0.02, fused=True)
    began, step, running = time.monotonic(), 0, 0.0
    while step < options.steps:
        rate = options.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, subject, style = (t.to(device) for t in draw_batch(views, np.random.default_rng([8, step]), options.batch))
        with autocast(device, options.dtype):
            subject_logits, style_logits = network(x)
        loss = functional.cross_entropy(subject_logits.float(), subject, label_smoothing=0.05)
        loss = loss + 0.3 * functional.cross_entropy(style_logits.float(), style, ignore_index=-1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(network)
        step += 1
        running += float(loss.detach())
        if step % 100 == 0:
            print(
                f"step {step} loss {running / 100:.3f} {step * options.batch / (time.monotonic() - began):.0f}/s",
                flush=True,
            )
            running = 0.0
    return average, {"steps": step, "pictures": step * options.batch, "minutes": (time.monotonic() - began) / 60}


def card(facts: dict[str, Any]) -> str:
    """Write the judge's card."""
    seen, unseen = (f"{s[0]:.2%} | {s[1]:.2%} | {s[2]:,}" for s in (facts["seen"], facts["unseen"]))
    return f"""# Judge

A small convolutional network ({facts["parameters"] / 1e6:.2f} M parameters) that names the subject
({facts["subjects"]} of them) and the style (five) of a 64-pixel picture. It is only a measuring
instrument for the models of this repository.

Trained on {facts["pictures"]:,} renders of emoji art (the five styles, and noto-v1, fxemoji and emojione
as further views) with random place, size, background, blur, loss of resolution, colour shift and
noise, on one CPU thread. **No picture made by a model was used, and none
passed through an autoencoder.**

| test on renders drawn with seeds never used in training | subject | style | pictures |
|---|---|---|---|
| style x subject cells of the training set | {seen} |
| cells kept out of training ({facts["cells out"]}) | {unseen} |

Use: `from assets.build.judge import load_judge; load_judge().classify(pictures)`.
Limits: it always names one of its subjects, also for a picture that shows none.

The weights are under Apache-2.0; the art is listed in `assets/NOTICE`.
"""


def save(network: Network, widths: Sequence[int], facts: dict[str, Any], target: Path) -> None:
    """Write weights (fp16), config with labels, facts and card into ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().half().contiguous() for name, value in network.state_dict().items()}
    files.write(target / "model.safetensors", lambda part: save_file(weights, part))
    config = {"input": INPUT, "widths": list(widths), "labels": list(data.CONCEPTS), "styles": list(data.STYLES)}
    write_json(target / "config.json", config)
    write_json(target / "facts.json", facts)
    files.write_text(target / "README.md", card(facts))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, test, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12, help="test pictures per view")
    parser.add_argument("--target", type=Path, default=Path(assets.__file__).parent / "models" / "judge")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(4)
    views = load_views(extra=True)
    out = held_cells(views)
    network = Network(len(data.CONCEPTS), len(data.STYLES))
    size = sum(p.numel() for p in network.parameters())
    print(f"{size / 1e6:.2f} M parameters, {len(views.sprites)} views, {out.sum()} cells kept out", flush=True)
    average, facts = train(network, views.only(~out), options)
    average.copy_to(network)
    network.cpu().eval()
    five = views.styles >= 0
    facts |= {"parameters": size, "subjects": len(data.CONCEPTS), "cells out": int(out.sum())}
    facts["seen"] = accuracy(network, views.only(five & ~out), 123_456, options.rounds)
    facts["unseen"] = accuracy(network, views.only(out), 123_457, 4 * options.rounds)
    save(network, (32, 64, 112, 176), facts, options.target)
    print(facts)


if __name__ == "__main__":
    main()
