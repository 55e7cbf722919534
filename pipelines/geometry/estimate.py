"""What a reconstruction will cost, told before it starts: memory by arithmetic, time by a short measurement."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from pipelines.geometry.network import NetworkConfig, PointmapNetwork

ALIGNMENT_BYTES = 385
"""Per pixel of an ordered pair, with gradients, as ``benchmarks.geometry_size`` measures it."""


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak, and seconds for asking the network, for the alignment and for training the adapter."""

    pairs: int
    parameters: int
    memory: int
    network_seconds: float
    alignment_seconds: float
    training_seconds: float

    def __str__(self) -> str:
        text = f"{self.pairs} ordered pairs, about {self.memory / 1e9:.1f} GB; network {self.network_seconds:.0f} s"
        text += f", alignment {self.alignment_seconds:.0f} s" if self.alignment_seconds else ""
        return text + (f", calibration {self.training_seconds:.0f} s more" if self.training_seconds else "")


def flops(config: NetworkConfig, height: int, width: int) -> tuple[float, float]:
    """Floating point operations of encoding one image and of decoding one ordered pair (products only)."""
    tokens = height * width / config.patch_size**2
    e, d = config.enc_embed_dim, config.dec_embed_dim
    inner = 2 * config.mlp_ratio
    encode = config.enc_depth * (2 * tokens * e * e * (4 + inner) + 4 * tokens * tokens * e)
    decode = 2 * config.dec_depth * (2 * tokens * d * d * (8 + inner) + 8 * tokens * tokens * d)
    if config.head_type == "dpt":  # two full-resolution convolutions outweigh everything else in the head
        decode += 2 * 2 * height * width * 9 * (128 * 128 + 256 * 128 / 4 + 5 * 256 * 256 / 16)
    else:
        decode += 2 * 2 * tokens * d * 4 * config.patch_size**2
    return encode, decode


def speed(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of matrix products here: the fastest of some, so that other programs disturb it little."""
    size = 2048 if device.type == "cuda" else 384
    a = torch.randn(size, size, device=device, dtype=dtype)
    best, end = math.inf, time.perf_counter() + 0.05
    for count in range(40):
        begun = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        best = min(best, now - begun)
        if count > 4 and now > end:
            break
    return 2 * size**3 / best


def alignment_pace(device: torch.device) -> float:
    """Seconds that one step of the alignment takes per pixel of an ordered pair: its distances and their gradients."""
    count = 2**15
    world = torch.randn(2, count, 3, device=device, requires_grad=True)
    points, turn = torch.randn(2, count, 3, device=device), torch.eye(3, device=device, requires_grad=True)
    best = math.inf
    for _ in range(5):
        begun = time.perf_counter()
        apart = world - (2 * (points @ turn.mT) + 1)
        ((apart * apart).sum(-1) + 1e-18).sqrt().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best / count


def estimate(
    config: NetworkConfig, images: int, pairs: int, height: int, width: int, device: torch.device, chunk: int = 8,
    epochs: int = 0, steps: int = 0,
) -> Estimate:  # fmt: skip
    """Cost of ``images`` pictures of a size and ``pairs`` ordered pairs; ``epochs`` > 0 adds calibration, ``steps`` > 0
    that many steps of alignment.

    Memory: weights in fp32 and the most of three stages: cached tokens, predictions and one chunk's activations;
    the alignment; a training step.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in PointmapNetwork(config).parameters())
    tokens = height * width // config.patch_size**2
    cache = images * tokens * config.enc_embed_dim * 4
    head = 256 * (height // 2) * (width // 2) * 3 if config.head_type == "dpt" else 8 * height * width
    work = chunk * 2 * 4 * (head + tokens * config.dec_embed_dim * (config.dec_depth + 12))
    kept = pairs * height * width * 32
    aligned = pairs * height * width * ALIGNMENT_BYTES if steps else 0
    train = (
        2
        * 2
        * tokens
        * 4
        * (config.enc_embed_dim * config.enc_depth * 14 + config.dec_embed_dim * config.dec_depth * 36)
    )
    encode, decode = flops(config, height, width)
    pace = speed(device, torch.bfloat16 if device.type == "cuda" else torch.float32) * 0.5
    seconds = (images * encode + pairs * decode) / pace
    training = epochs * pairs * (2 * encode + decode) * 3 / pace
    memory = parameters * 4 + max(cache + kept + work, aligned, kept + train if epochs else 0)
    # Gathering the views, cameras and Adam cost as much again: 93 ns against 48 in benchmarks.geometry_size.
    aligning = 2 * steps * pairs * height * width * alignment_pace(device) if steps else 0.0
    return Estimate(pairs, parameters, memory, seconds, aligning, training)
